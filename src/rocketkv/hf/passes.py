"""A forward pass: what is checked before it begins, and the object that goes from layer to layer."""

import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError, UnsupportedError
from rocketkv.hf.history import UNKNOWN, History
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.hf.padding import Padding
from rocketkv.hf.padding import read as read_padding
from rocketkv.hf.plain import has_tokens
from rocketkv.hf.states import has_states
from rocketkv.ops import LogitTerms


class Pass:
    """A forward pass through the layers of one cache.

    The hook hands the object down to the attention function as a keyword; nothing else tells a layer of the pass.

    Args:
        layers: the layers of the cache.
        ids: `[B, T]` integers, the new columns.
        padding: the padding among the new columns.

    Attributes:
        layers: as given.
        ids: as given.
        padding: as given.
        waits: for each layer, whether it is compressed and has yet to attend in this pass.
        plain_layers: copies of transformers' own layers with tokens from before the pass, by index.
        owners: for each layer that attends to the keys and values of another, by index, that other layer.
        ahead: `[B, T]` int64, how far each new token sees ahead of itself (`LogitTerms.ahead`); None: none does.
    """

    ahead: Tensor | None = None
    owners: Mapping[int, int] = MappingProxyType({})

    def __init__(self, layers: list[Any], ids: Tensor, padding: Padding) -> None:
        self.layers = layers  # and not the cache, which refers to its pass
        self.ids = ids
        self.padding = padding
        self.waits = [isinstance(layer, RocketKVLayer) for layer in layers]
        self.plain_layers = {i: copy(layer) for i, layer in find_plain_layers(layers).items()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped; our step runs uncompiled
    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: LogitTerms
    ) -> Tensor:
        """Attend the new tokens in the compressed layer `index`; see `RocketKVLayer.attend`."""
        if (owner := self.owners.get(index)) is not None:
            read: Tensor = self.layers[owner].read(query, self.padding, scale, terms)
            return read
        output: Tensor = self.layers[index].attend(query, key, value, self.padding, scale, terms)
        self.waits[index] = False  # not before: a layer that still waits tells of a pass that broke off
        return output

    def share(self, owners: Mapping[int, int]) -> None:
        """Let layers attend to the keys and values of others, their `owners`; `finish` frees what these keep for it."""
        self.owners = owners
        for layer in self._owning:
            layer.keep_prompt(True)

    def finish(self) -> None:
        """Free what the pass alone needed."""
        for layer in self._owning:
            layer.keep_prompt(False)

    @property
    def _owning(self) -> list[RocketKVLayer]:
        """The compressed layers that others read, too."""
        owning = (self.layers[owner] for owner in set(self.owners.values()))
        return [layer for layer in owning if isinstance(layer, RocketKVLayer)]

    def was_seen_by_all(self, before: int) -> bool:
        """Return whether every layer, having seen `before` columns, has seen those of the pass.

        Of recurrent states this cannot be told, so a cache with some has not.
        """
        after = {before + self.ids.shape[1]}
        return not self._keeps_states and all(columns == after for columns in self._seen().values())

    def check_unbroken(self, before: int) -> None:
        """Refuse to go on after a pass in which only some of the compressed layers have attended.

        Args:
            before: the number of columns that each layer had seen before the pass.

        Raises:
            InputError: a compressed layer has seen other columns than those, or a layer keeps recurrent states.
        """
        seen = self._seen()
        if not self._keeps_states and all(seen[i] == {before} for i in seen if i not in self.plain_layers):
            return
        after = {before + self.ids.shape[1]}
        broken = next((i for i, columns in seen.items() if columns != after), len(self.layers) - 1)
        goes_back = before > 0 and not self._keeps_states
        way_out = ", or cache.rewind_to(ids) with the text that it had seen before" if goes_back else ""
        raise InputError(
            f"in layer {broken}, an earlier forward pass with this cache broke off half way; call cache.reset() "
            f"and start anew{way_out}."
        )

    @property
    def _keeps_states(self) -> bool:
        return any(has_states(layer) for layer in self.layers)

    def _seen(self) -> dict[int, set[int]]:
        """Return the numbers of columns that each layer with tokens, or each part of a layer, has seen."""
        return {
            i: layer.part_seen if isinstance(layer, RocketKVLayer) else {layer.get_seq_length()}
            for i, layer in enumerate(self.layers)
            if isinstance(layer, RocketKVLayer) or has_tokens(layer)
        }


def announce(
    layers: list[Any],
    history: History,
    config: RocketKVConfig,
    tokens: Tensor,
    attention_mask: object,
    position_ids: Tensor | None,
) -> Pass:
    """Check everything that can be refused before a forward pass changes anything, and make the pass.

    Args:
        layers: the layers of the cache, as they are before the pass.
        history: the columns that the cache has seen; tokens that came through `LayerCache.adopt` are noted in it.
        config: the options of the compression.
        tokens: `[B, T]` integers, the new columns; UNKNOWN where there is no id.
        attention_mask: `[B, seen + T]`, zero in padded columns; None if no new column is padded.
        position_ids: `[B, T]` or `[1, T]` integers, if the model was given any.

    Raises:
        InputError: the mask, the batch or positions do not fit, or nothing is new.
        UnsupportedError: the mask is not one of left padding, the text outgrows a sliding window, or columns are
            padded that would go into recurrent states after tokens.
    """
    compressed = [layer for layer in layers if isinstance(layer, RocketKVLayer)]
    rows, num_new = tokens.shape
    adopted = compressed[0].get_seq_length() - history.num_columns
    if adopted > 0:
        history.append(torch.full((history.num_rows or rows, adopted), UNKNOWN), history.mask)
    seen = history.num_columns
    if num_new == 0:
        raise InputError("no new tokens came with this cache; give one at least.")
    history.check_rows(rows)
    for layer in compressed:
        if layer.window is not None and seen + num_new > layer.window:
            raise UnsupportedError(
                f"{seen + num_new} tokens are more than this model's sliding window of {layer.window}; "
                "give a shorter text or use transformers' DynamicCache."
            )
    padding = read_padding(attention_mask, seen, history.mask, num_rows=rows, num_new=num_new)
    if padding.counts is not None and seen > 0 and any(has_states(layer) for layer in layers):
        raise UnsupportedError(
            "padding came after tokens, and this model's recurrent states would take it in; give later turns whose "
            "rows are equally long, or each row a cache of its own."
        )
    if position_ids is not None and num_new > 1 and seen > 0:
        check_positions(position_ids, history.num_tokens(seen), num_new, padding.counts)
    is_short = config.mode == "single_turn" or num_new < config.window_size
    if num_new > 1 and compressed[0].cache.just_prefilled and is_short:
        warnings.warn(
            "a second prompt before any token was decoded: each forward pass is its own turn, so a prompt given in "
            "chunks is not what it is in one piece; use mode='multi_turn' and a last chunk of window_size or more.",
            stacklevel=3,
        )
    return Pass(layers, tokens, padding)


def find_plain_layers(layers: list[Any]) -> dict[int, DynamicLayer]:
    """Return those layers that are transformers' own and keep tokens, by index."""
    return {i: layer for i, layer in enumerate(layers) if has_tokens(layer)}


def check_positions(position_ids: Tensor, row_seen: Sequence[int], num_new: int, counts: Tensor | None) -> None:
    """Refuse new tokens at positions where the cache has seen others.

    Args:
        position_ids: `[B, T]` or `[1, T]` integers; tensors of other shapes, which some models take, are not checked.
        row_seen: the number of tokens that each row has seen, padding left out.
        num_new: T.
        counts: as in `Padding`.

    Raises:
        InputError: a row's last position is less than its number of tokens allows.
    """
    if position_ids.dim() != 2:
        return
    seen = torch.tensor(row_seen, device=position_ids.device)
    last = seen + num_new - 1 - (0 if counts is None else counts.to(seen.device))
    if bool((position_ids[:, -1] < last).any()):
        raise InputError(
            f"position_ids end at {position_ids[:, -1].tolist()}, but the cache has seen {seen.tolist()} tokens "
            f"and {num_new} came; give the new tokens only, or call cache.reset() to take in the text anew."
        )
