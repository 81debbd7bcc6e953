"""Several caches as the rows of one batch: a model's step serves them all, whatever each of them compresses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError, UnsupportedError
from rocketkv.hf import Call, RocketKVCache, RocketKVLayer, join_rows, plain_stats
from rocketkv.stats import CacheStats, LayerStats


class StackedLayer(RocketKVLayer):
    """A layer of a stack: the layers of several caches, each of which attends for its own row of the batch.

    Args:
        parts: layers of one row each that have seen equally many columns; what all rows share is asked of the first.
    """

    def __init__(self, parts: Sequence[RocketKVLayer]) -> None:
        super().__init__(parts[0].cache, parts[0].window)
        self.parts = list(parts)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as in RocketKVLayer
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of the new tokens, `[B, Hq, T, D]`: row i through the i-th part, as it would be alone."""
        assert self.call is not None
        outputs = []
        for i, part in enumerate(self.parts):
            row = slice(i, i + 1)
            part.call = Call(*(None if x is None else x[row] for x in self.call))
            outputs.append(part.attend(query[row], key[row], value[row], scale))
        self.call = None
        return torch.cat(outputs)

    def end_turn(self) -> None:
        """Let the next prompt be a turn of its own."""
        for part in self.parts:
            part.end_turn()

    def copy(self) -> "StackedLayer":
        """An independent layer in the same state."""
        return StackedLayer([part.copy() for part in self.parts])

    def fork(self, config: RocketKVConfig) -> RocketKVLayer:
        """Refused: a fork is of one way to compress.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("a stack cannot be forked; fork its caches and stack the forks.")

    def only_decoded_since(self, row_seen: Sequence[int]) -> bool:
        """Whether the tokens after the first `row_seen` of each row were decoded since the last prompt."""
        return all(part.only_decoded_since([seen]) for part, seen in zip(self.parts, row_seen, strict=True))

    def check_rewind(self, row_seen: Sequence[int]) -> None:
        """Refuse what `rewind` cannot do."""
        for part, seen in zip(self.parts, row_seen, strict=True):
            part.check_rewind([seen])

    def rewind(self, num_seen: int, row_seen: Sequence[int]) -> None:
        """Forget all but the first columns, `num_seen` of them."""
        for part, seen in zip(self.parts, row_seen, strict=True):
            part.rewind(num_seen, [seen])
        self.call = None

    @property
    def part_seen(self) -> set[int]:
        """Columns seen by the parts of the layer."""
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
        """Repeat every row: refused unless once; see `batch_select_indices`."""
        self.batch_select_indices(torch.arange(len(self.parts)).repeat_interleave(repeats))

    def stats(self) -> LayerStats:
        """What all rows hold and read."""
        return CacheStats([part.stats() for part in self.parts]).total


def stack(caches: Sequence[RocketKVCache]) -> RocketKVCache:
    """One cache with the rows of several, which may compress in different ways and decode together from now on.

    Each compressed layer goes through its own cache's `prefill` and `decode`, so a row is attended to as it would be
    alone; the rest of the model may round differently for a batch. Use the caches through the stack only;
    after `reset` it is an empty cache like the first of them.

    Args:
        caches: of one model and one row each, or stacks; without left padding.

    Raises:
        InputError: they have not seen equally many columns, one has several rows or padding, or one is there twice.
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
    """What one row of a stack holds and reads."""
    rows = next(len(layer.parts) for layer in cache.layers if isinstance(layer, StackedLayer))
    return CacheStats(
        [
            layer.parts[row].stats() if isinstance(layer, StackedLayer) else plain_stats(layer, rows)
            for layer in cache.layers
        ]
    )
