"""RocketKV as a cache of transformers: the object that users hand to `generate`.

`switch.py` hangs the cache into a model, `support.py` says which models fit, `history.py` holds the tokens seen so far,
`saved.py` has `save` and `load`.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rocketkv.checks import check_config as check_rocketkv_config
from rocketkv.checks import check_rows
from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError
from rocketkv.hf.history import History, join
from rocketkv.hf.images import Noted
from rocketkv.hf.layer import RocketKVLayer, compress, unannounced
from rocketkv.hf.layout import check_same_layout
from rocketkv.hf.modality import count_images, find_images
from rocketkv.hf.passes import Pass, announce, find_plain_layers
from rocketkv.hf.plain import cache_stats
from rocketkv.hf.rewind import rewind_to as rewind_cache
from rocketkv.hf.saved import SavedCache
from rocketkv.hf.support import check_config
from rocketkv.stats import CacheStats


class RocketKVCache(SavedCache, DynamicCache):
    """A compressed cache for `model.generate(..., cache=cache)` of an enabled model.

    Versions of transformers before 5.24 call the argument `past_key_values`.

    Full-attention layers are compressed; sliding windows and recurrent states stay as transformers has them. A second
    `generate` with the same cache is the next turn of the conversation: give it the whole text so far, with the new
    text at the end. One cache serves one conversation, or batch, at a time. `copy.copy`, `copy.deepcopy` and `pickle`
    make independent caches in the same state.

    Args:
        config: the model's configuration, `model.config`.
        rocketkv_config: the options of the compression.
        keep_queries: the number of last queries of each prompt that are kept for `fork`, in `multi_turn` only.

    Attributes:
        history: the token ids that the cache has seen.
        noted: what the model was given, left here for its decoder's hook.

    Raises:
        InputError: `config` is no configuration of transformers.
        ConfigError: `rocketkv_config` is no `RocketKVConfig`.
        UnsupportedError: the architecture is not supported.
    """

    def __init__(self, config: PreTrainedConfig, rocketkv_config: RocketKVConfig, *, keep_queries: int = 0) -> None:
        check_config(config)
        check_rocketkv_config(rocketkv_config)
        super().__init__(config=config)
        self.model_config = config
        self.config = rocketkv_config
        self.keep_queries = keep_queries
        self.layers[:] = [compress(layer, config, rocketkv_config, keep_queries) for layer in self.layers]
        self.history = History()
        self.noted = Noted()
        self._pass: Pass | None = None  # the pass that was announced and has not finished
        self._decoder: ref[PreTrainedModel] | None = None  # the one that filled the cache; None if it is not known

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has seen a prompt."""
        return all(layer.is_initialized for layer in self.compressed_layers)

    @property
    def compressed_layers(self) -> list[RocketKVLayer]:
        """The layers that are compressed, in order."""
        return [layer for layer in self.layers if isinstance(layer, RocketKVLayer)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns seen, padding included."""
        layer = self.layers[layer_idx] if layer_idx else self.compressed_layers[0]  # a refused pass leaves these alone
        return int(layer.get_seq_length())

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of columns of a layer's mask and the first of them; see `images.read_ahead`."""
        if self.noted.has_joined_images and isinstance(self.layers[layer_idx], RocketKVLayer):
            return self.get_seq_length() + query_length, 0
        length, first = super().get_mask_sizes(query_length, layer_idx)
        return length, first

    def stats(self) -> CacheStats:
        """Return what the cache stores and reads, per layer and in all, beside what a full cache would."""
        return count_images(cache_stats(self), self.layers, find_images(self.model_config, self.history))

    def reset(self) -> None:
        """Forget everything, transformers' own layers included (some versions of it only zero those)."""
        self.layers[:] = RocketKVCache(self.model_config, self.config, keep_queries=self.keep_queries).layers
        self.history = History()
        self._pass = self._decoder = None

    def copy(self) -> "RocketKVCache":
        """Return an independent cache in the same state.

        Raises:
            InputError: a forward pass broke off half way; `fork` and the methods that select rows raise it, too.
        """
        self._recover()
        return self._like(self.config, lambda layer: layer.copy())

    def __copy__(self) -> "RocketKVCache":
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> "RocketKVCache":
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        self._recover()
        return {**vars(self), "noted": Noted(), "_decoder": None}

    def end_turn(self) -> None:
        """Let the next prompt be a turn of its own, though nothing was decoded since the last one."""
        for layer in self.compressed_layers:
            layer.end_turn()

    def join_pieces(self) -> None:
        """Count all prompts so far as pieces of one; see `LayerCache.join_pieces`."""
        for layer in self.compressed_layers:
            layer.cache.join_pieces()

    def fork(self, rocketkv_config: RocketKVConfig) -> "RocketKVCache":
        """Return a cache with the same past that compresses as `rocketkv_config` says; this one stays as it is.

        One prefill of a long text can thus serve many questions and many ways to compress. Right after a prompt whose
        last queries were kept (`keep_queries`) the fork is ready to decode, as if the fork had seen the prompt itself;
        otherwise the fork starts with its next prompt. See `LayerCache.fork`.

        Raises:
            InputError: this cache is not `multi_turn` or a stack, or the fork would need queries that were not kept.
        """
        self._recover()
        return self._like(rocketkv_config, lambda layer: layer.fork(rocketkv_config))

    def _like(
        self, rocketkv_config: RocketKVConfig, change: Callable[[RocketKVLayer], RocketKVLayer]
    ) -> "RocketKVCache":
        """Return a cache with the same past: compressed layers as `change` makes them, copies of all others."""
        layers = [change(layer) if isinstance(layer, RocketKVLayer) else deepcopy(layer) for layer in self.layers]
        other = RocketKVCache(self.model_config, rocketkv_config, keep_queries=self.keep_queries)
        other.layers[:] = layers
        other.history, other._decoder = self.history.copy(), self._decoder
        return other

    def follow(self, caches: Sequence["RocketKVCache"]) -> None:
        """Take over the history of several caches whose rows this cache consists of."""
        self.history = join([cache.history for cache in caches])
        self._decoder = caches[0]._decoder

    def rewind_to(self, ids: Tensor) -> int:
        """Forget all that does not belong to a text, so that `generate` can continue with that text.

        The longest common beginning of the text and the tokens seen stays, without the text's last token, or, where
        tokens of a prompt go, without its last `window_size` tokens: `generate` takes those in again. A chat template
        that drops earlier thoughts, an answer that is to be given again, or a forward pass that broke off need not
        cost the conversation.

        Args:
            ids: `[B, L]` integers, the text so far, as it will be given to `generate`; padded as it was.

        Returns:
            The number of columns that stay, 0 to L - 1.

        Raises:
            InputError: `ids` do not fit the cache's rows, or tokens of a prompt are to go from a `single_turn` cache.
            UnsupportedError: a sliding window has dropped tokens that would be needed, or states cannot go back.
        """
        keep = rewind_cache(self, ids)
        if keep > 0:
            self._pass = None
            self.end_turn()
        return keep

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch by the rows `beam_idx` (`[B]` int64), as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices` (`[B']` int64)."""
        self._recover()
        if self.history.num_rows is None:
            return
        check_rows(indices, self.history.num_rows)
        for layer in self.layers:
            layer.reorder_cache(indices)
        self.history.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.history.num_rows is not None:
            self.batch_select_indices(torch.arange(self.history.num_rows).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Refuse to roll back, before any layer changes; see `RocketKVLayer.crop`."""
        self.compressed_layers[0].activate_past_recording()

    def check_decoder(self, decoder: PreTrainedModel) -> None:
        """Refuse a decoder that this cache was not made for, or that is not the one whose tokens the cache has seen.

        Raises:
            InputError: layers, windows, KV heads or head_dim differ, or another model has filled the cache.
        """
        if self._decoder is not None and self._decoder() is decoder:
            return
        check_same_layout(self.model_config, decoder.config)
        if self._decoder is not None and self.history.num_columns > 0:
            raise InputError(
                f"another model has filled this cache, not this {type(decoder).__name__}; "
                "go on with that one, or call cache.reset()."
            )
        self._decoder = ref(decoder)

    def check_continued(self, ids: Tensor) -> None:
        """Refuse a text, `[B, L]` integers, that does not continue what the cache has seen.

        Raises:
            InputError: the text begins otherwise, nothing of the text is new, or an earlier pass broke off.
        """
        self._recover()
        self.history.check_continued(ids)

    def begin(self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None) -> Pass:
        """Announce a forward pass; the hook of `enable` calls this. A call that raises changes nothing.

        Args:
            tokens: `[B, T]` integers, the new columns; UNKNOWN where there is no id.
            attention_mask: `[B, seen + T]`, zero in padded columns; None if no new column is padded.
            position_ids: `[B, T]` or `[1, T]` integers, if the model was given any.

        Returns:
            The pass, which the hook hands down to the attention function.

        Raises:
            InputError: the mask, the batch or positions do not fit, nothing is new, or an earlier pass broke off.
            UnsupportedError: the mask is not one of left padding.
        """
        self._recover()
        self._pass = announce(self.layers, self.history, self.config, tokens, attention_mask, position_ids)
        return self._pass

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return a compressed layer's new tokens `[B, Hkv, T, D]` as they are; the attention function stores them.

        Other layers store them at once and return all of theirs, as in transformers' own cache.

        Raises:
            UnsupportedError: no hook of `enable` has announced the forward pass.
        """
        if not isinstance(self.layers[layer_idx], RocketKVLayer):
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, values
        if self._pass is None or not self._pass.waits[layer_idx]:
            raise unannounced()
        return key_states, value_states

    def finish(self) -> bool:
        """Note the new columns of the pass in the history, if every compressed layer has attended; return whether."""
        if self._pass is None or any(self._pass.waits):
            return False
        self._pass.finish()
        self.history.append(self._pass.ids, self._pass.padding.mask)
        self._pass = None
        return True

    def plain_layers_before_pass(self) -> dict[int, DynamicLayer]:
        """Return transformers' own layers, by index, as they were before a pass that has not finished."""
        return find_plain_layers(self.layers) | ({} if self._pass is None else self._pass.plain_layers)

    def _recover(self) -> None:
        """Make good a pass that has not finished, if either no compressed layer has attended in it or all have.

        Raises:
            InputError: some layers have attended and others have not.
        """
        if self._pass is None:
            return
        before = self.history.num_columns
        if self._pass.was_seen_by_all(before) and self.finish():
            return
        self._pass.check_unbroken(before)
        for i, layer in self._pass.plain_layers.items():
            self.layers[i] = layer
        self._pass = None

    def withdraw(self) -> None:
        """Take back the announcement of a pass in which no layer has attended."""
        self._pass = None
