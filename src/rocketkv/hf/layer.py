"""One compressed layer of a model's cache: the layer methods that transformers calls, over a `LayerCache`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionLayer

from rocketkv.attention import LayerCache
from rocketkv.config import RocketKVConfig
from rocketkv.errors import UnsupportedError
from rocketkv.hf.padding import Padding
from rocketkv.hf.states import has_states, read_states, state_bytes, write_states
from rocketkv.hf.support import is_full
from rocketkv.hf.versions import dependency
from rocketkv.ops import NO_TERMS, LogitTerms, take_tokens
from rocketkv.stats import LayerStats


class RocketKVLayer(CacheLayerMixin):
    """A layer of the model's cache that computes its attention itself, through a `LayerCache`.

    Args:
        cache: the layer's keys and values, and the attention over them.
        window: the length in tokens of the sliding window of a layer whose window covers the model's whole context;
            None for a layer without a window.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: LayerCache, window: int | None = None) -> None:
        super().__init__()
        self.cache = cache
        self.window = window

    @property
    def is_initialized(self) -> bool:
        """Whether the layer has seen a prompt."""
        return self.cache.num_seen > 0

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Ignore what transformers sets: the cache knows the answer."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer starts with its first prompt."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse tokens that do not come through `RocketKVCache.update` in a forward pass that a hook has announced.

        Raises:
            UnsupportedError: always.
        """
        raise unannounced()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Padding,
        scale: float | None,
        terms: LogitTerms = NO_TERMS,
    ) -> Tensor:
        """Attend the new tokens of a forward pass through the compressed cache.

        Args:
            query: `[B, Hq, T, D]` float, after RoPE.
            key: `[B, Hkv, T, D]` in the dtype of `query`, after RoPE.
            value: like `key`.
            padding: the padding among the T new columns.
            scale: the factor on the dot products; None stands for 1 / sqrt(D).
            terms: the layer's sinks and soft cap.

        Returns:
            `[B, Hq, T, D]`.

        Raises:
            RocketKVError: as `LayerCache.prefill` and `LayerCache.decode` raise it.
        """
        if query.shape[2] == 1 and self.cache.num_seen > 0 and not self.cache.awaits_prompt:
            return self.cache.decode(query, key, value, scale=scale, terms=terms)
        if padding.order is None:
            return self.cache.prefill(query, key, value, padding=padding.counts, scale=scale, terms=terms)
        order = padding.order.to(query.device)  # a device map may put layers on several devices
        query, key, value = (_take_columns(x, order) for x in (query, key, value))
        output = self.cache.prefill(query, key, value, padding=padding.counts, scale=scale, terms=terms)
        return _take_columns(output, order.argsort(1))

    def read(self, query: Tensor, padding: Padding, scale: float | None, terms: LogitTerms = NO_TERMS) -> Tensor:
        """Attend another layer's queries, `[B, Hq, T', D]`, after this one has attended in a pass of T new columns.

        T' is T, or 1 where the other layer computes the last column only. The other arguments are those of `attend`.

        Raises:
            RocketKVError: as `LayerCache.read_prompt` and `LayerCache.read_token` raise it.
        """
        if self.cache.prompt is None:
            return self.cache.read_token(query, scale=scale, terms=terms)
        if padding.order is None or query.shape[2] == 1:
            return self.cache.read_prompt(query, scale=scale, terms=terms)
        order = padding.order.to(query.device)
        output = self.cache.read_prompt(_take_columns(query, order), scale=scale, terms=terms)
        return _take_columns(output, order.argsort(1))

    def keep_prompt(self, keeps: bool) -> None:
        """Let prompts be kept for `read`, or free what was kept."""
        self.cache.keeps_prompt, self.cache.prompt = keeps, None

    def end_turn(self) -> None:
        """Let the next prompt be a turn of its own; see `RocketKVCache.end_turn`."""
        self.cache.end_turn()

    def copy(self) -> "RocketKVLayer":
        """Return an independent layer in the same state."""
        return RocketKVLayer(self.cache.copy(), self.window)

    def fork(self, config: RocketKVConfig) -> "RocketKVLayer":
        """Return a layer with the same past that compresses as `config` says; see `LayerCache.fork`."""
        return RocketKVLayer(self.cache.fork(config), self.window)

    def only_decoded_since(self, row_seen: Sequence[int]) -> bool:
        """Return whether the tokens after the first `row_seen` of each row were decoded since the last prompt."""
        return self.cache.only_decoded_since(row_seen)

    def check_rewind(self, row_seen: Sequence[int]) -> None:
        """Raise an `InputError` where `rewind` would."""
        self.cache.check_rewind(row_seen)

    def rewind(self, num_seen: int, row_seen: Sequence[int]) -> None:
        """Forget all but the first `num_seen` columns; see `LayerCache.rewind`."""
        self.cache.rewind(num_seen, row_seen)

    @property
    def part_seen(self) -> set[int]:
        """The columns seen by each part of the layer: one number, unless a pass broke off inside the layer."""
        return {self.cache.num_seen}

    def get_seq_length(self) -> int:
        """Return the columns seen, padding included, in which transformers counts positions and masks."""
        return self.cache.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return no columns: this layer needs no mask from transformers, so none is made (see `interface.mask`)."""
        return 0, 0

    def get_max_length(self) -> int:
        """Return -1, which stands for no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch by the rows `beam_idx` (`[B]` int64), as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices` (`[B']` int64)."""
        self.cache.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        rows = self.cache.num_stored.shape[0]
        self.batch_select_indices(torch.arange(rows, device=self.cache.num_stored.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to roll back: evicted tokens do not come back.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "a RocketKVCache cannot be rolled back, so assisted decoding does not work with it; "
            "generate without assistant_model and prompt_lookup_num_tokens, or use a DynamicCache."
        )

    def activate_past_recording(self) -> None:
        """Refuse, as `crop` does: transformers calls this method when it is going to roll the cache back."""
        self.crop(0)

    def num_kept(self, marked: Tensor) -> float:
        """Return how many of the marked tokens are kept, as the mean over rows and KV heads.

        Args:
            marked: `[B, N]` bool by position; tokens at positions from N on count as not marked.
        """
        positions = self.cache.positions  # [B, Hkv, S]
        held = (positions >= 0) & (positions < marked.shape[1])
        marks = marked.to(positions.device)[:, None].expand(-1, positions.shape[1], -1)
        found = marks.gather(2, positions.where(held, 0)) & held
        return float(found.sum()) / (positions.shape[0] * positions.shape[1])

    def stats(self) -> LayerStats:
        """Return what the layer stores and reads."""
        return self.cache.stats()


class HybridLayer(RocketKVLayer, LinearAttentionLayer):
    """A compressed layer that keeps recurrent states beside its tokens.

    Args:
        cache: as for `RocketKVLayer`.
        window: as for `RocketKVLayer`.
        number_of_states: the number of states of each kind that the layer may have.
    """

    def __init__(self, cache: LayerCache, window: int | None, number_of_states: int) -> None:
        RocketKVLayer.__init__(self, cache, window)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make room for a state, as transformers does before it writes the first one."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def copy(self) -> "HybridLayer":
        """Return an independent layer in the same state."""
        return self._beside(self.cache.copy())

    def fork(self, config: RocketKVConfig) -> "HybridLayer":
        """Return a layer with the same past that compresses as `config` says; see `LayerCache.fork`."""
        return self._beside(self.cache.fork(config))

    def _beside(self, cache: LayerCache) -> "HybridLayer":
        """Return a layer with copies of the states beside another cache."""
        layer = HybridLayer(cache, self.window, self.number_of_states)
        write_states(layer, read_states(self))
        return layer

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices` (`[B']` int64)."""
        super().batch_select_indices(indices)
        LinearAttentionLayer.reorder_cache(self, indices)

    def stats(self) -> LayerStats:
        """Return what the layer stores and reads, its states included."""
        stats, num_bytes = super().stats(), state_bytes(self)
        sizes = ("kv_bytes", "read_bytes", "full_kv_bytes", "full_read_bytes")
        return replace(stats, **{name: getattr(stats, name) + num_bytes for name in sizes})


def compress(layer: DynamicLayer, config: PreTrainedConfig, rocketkv_config: RocketKVConfig, keep_queries: int) -> Any:
    """Return a compressed layer in place of one of transformers' own that attends to everything, else that one."""
    if not is_full(layer, config.get_text_config(decoder=True)):
        return layer
    cache, window = LayerCache(rocketkv_config, keep_queries), getattr(layer, "sliding_window", None)
    return HybridLayer(cache, window, layer.number_of_states) if has_states(layer) else RocketKVLayer(cache, window)


def unannounced() -> UnsupportedError:
    """Return the refusal of a forward pass that no hook of `enable` has announced."""
    known = dependency("transformers")
    return UnsupportedError(
        "a RocketKVCache reached a layer of a model, but no hook of rocketkv.enable has seen the forward pass; "
        "call rocketkv.enable(model) first. If the model is enabled, then the transformers at hand, "
        f"{known.installed}, hands caches on in a way of its own; install a tested version, {known.tested}."
    )


def _take_columns(tokens: Tensor, order: Tensor) -> Tensor:
    """Reorder the columns of `tokens` `[B, H, T, D]` row by row, as `order` `[B, T]` int64 says."""
    return take_tokens(tokens, order[:, None].expand(-1, tokens.shape[1], -1))
