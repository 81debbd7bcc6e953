"""Several caches as the rows of one batch: a step of the model serves them all, however each of them compresses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError, UnsupportedError
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.layer import HybridLayer, RocketKVLayer
from rocketkv.hf.padding import Padding
from rocketkv.hf.plain import join_rows, plain_stats
from rocketkv.ops import NO_TERMS, LogitTerms
from rocketkv.stats import CacheStats, LayerStats


class StackedLayer(RocketKVLayer):
    """A layer of a stack: the layers of several caches, each of which attends for its own row of the batch.

    Args:
        parts: layers of one row each that have seen equally many columns; the first answers for what all rows share.
    """

    def __init__(self, parts: Sequence[RocketKVLayer]) -> None:
        if isinstance(parts[0], HybridLayer):
            raise UnsupportedError("this model's layers keep states beside their tokens, so its caches do not stack.")
        super().__init__(parts[0].cache, parts[0].window)
        self.parts = list(parts)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Padding,
        scale: float | None,
        terms: LogitTerms = NO_TERMS,
    ) -> Tensor:
        """Attend the new tokens, `[B, Hq, T, D]`: row i through the i-th part, as the part would attend alone."""
        outputs = []
        for i, part in enumerate(self.parts):
            row = slice(i, i + 1)
            outputs.append(part.attend(query[row], key[row], value[row], padding.row(i), scale, terms.of_rows(row)))
        return torch.cat(outputs)

    def read(self, query: Tensor, padding: Padding, scale: float | None, terms: LogitTerms = NO_TERMS) -> Tensor:
        """Attend another layer's queries, row by row as `attend` does; see `RocketKVLayer.read`."""
        rows = [slice(i, i + 1) for i in range(len(self.parts))]
        return torch.cat(
            [
                part.read(query[row], padding.row(row.start), scale, terms)
                for part, row in zip(self.parts, rows, strict=True)
            ]
        )

    def keep_prompt(self, keeps: bool) -> None:
        """Let prompts be kept for `read`, or free what was kept."""
        for part in self.parts:
            part.keep_prompt(keeps)

    def end_turn(self) -> None:
        """Let the next prompt be a turn of its own."""
        for part in self.parts:
            part.end_turn()

    def copy(self) -> "StackedLayer":
        """Return an independent layer in the same state."""
        return StackedLayer([part.copy() for part in self.parts])

    def fork(self, config: RocketKVConfig) -> RocketKVLayer:
        """Refuse to fork: the parts may compress in different ways.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("a stack cannot be forked; fork its caches and stack the forks.")

    def only_decoded_since(self, row_seen: Sequence[int]) -> bool:
        """Return whether the tokens after the first `row_seen` of each row were decoded since the last prompt."""
        return all(part.only_decoded_since([seen]) for part, seen in zip(self.parts, row_seen, strict=True))

    def check_rewind(self, row_seen: Sequence[int]) -> None:
        """Raise an `InputError` where `rewind` would."""
        for part, seen in zip(self.parts, row_seen, strict=True):
            part.check_rewind([seen])

    def rewind(self, num_seen: int, row_seen: Sequence[int]) -> None:
        """Forget all but the first `num_seen` columns."""
        for part, seen in zip(self.parts, row_seen, strict=True):
            part.rewind(num_seen, [seen])

    @property
    def part_seen(self) -> set[int]:
        """The columns seen by each part of the layer."""
        return {part.cache.num_seen for part in self.parts}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices` (`[B']` int64).

        Raises:
            UnsupportedError: a row is repeated, as beam search does.
        """
        rows = indices.tolist()
        if len(set(rows)) < len(rows):
            raise UnsupportedError("rows of a stack cannot be repeated; decode greedily or with num_beams=1.")
        self.parts = [self.parts[row] for row in rows]
        self.cache = self.parts[0].cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, which is refused unless it is 1; see `batch_select_indices`."""
        self.batch_select_indices(torch.arange(len(self.parts)).repeat_interleave(repeats))

    def num_kept(self, marked: Tensor) -> float:
        """Return how many of the tokens marked by position, `[B, N]` bool, are kept: the mean over rows and heads."""
        return sum(part.num_kept(marked[i : i + 1]) for i, part in enumerate(self.parts)) / len(self.parts)

    def stats(self) -> LayerStats:
        """Return what all rows store and read."""
        return CacheStats([part.stats() for part in self.parts]).total


def batch_caches(caches: Sequence[RocketKVCache]) -> RocketKVCache:
    """Make one cache, a stack, with the rows of several, which may compress in different ways and decode together.

    Each row goes through its own cache's `prefill` and `decode`, so the row is attended to as it would be alone; the
    rest of the model may round differently for a batch. Use the caches through the stack only. After `reset` the stack
    is an empty cache like the first of them.

    Args:
        caches: caches of one model, each of one row without left padding, or stacks.

    Raises:
        InputError: the caches have not seen equally many columns, one has several rows or padding, or one is there
            twice.
        UnsupportedError: a layer of the model keeps recurrent states beside its tokens.
    """
    if len({id(cache) for cache in caches}) < len(caches):
        raise InputError("a cache is given twice, whose rows would share their tokens; give its copy().")
    seen = sorted({cache.get_seq_length() for cache in caches})
    if len(seen) != 1 or seen[0] == 0:
        raise InputError(f"caches that have seen {seen} columns cannot be stacked; give some that saw equally many.")
    stacked = RocketKVCache(caches[0].model_config, caches[0].config)
    for i, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        if not isinstance(layers[0], RocketKVLayer):
            stacked.layers[i] = join_rows(layers)
            continue
        parts = [part for layer in layers for part in (layer.parts if isinstance(layer, StackedLayer) else [layer])]
        if any(len(part.cache.row_seen) > 1 or part.cache.row_seen != seen for part in parts):
            raise InputError("a cache of several rows or with padding cannot be stacked; give one row without padding.")
        stacked.layers[i] = StackedLayer(parts)
    stacked.follow(caches)
    return stacked


def row_stats(cache: RocketKVCache, row: int) -> CacheStats:
    """Return what one row of a stack stores and reads; its image tokens are not counted apart."""
    rows = next(len(layer.parts) for layer in cache.layers if isinstance(layer, StackedLayer))
    return CacheStats(
        [
            layer.parts[row].stats() if isinstance(layer, StackedLayer) else plain_stats(layer, rows)
            for layer in cache.layers
        ]
    )
