"""RocketKV as a cache of transformers: what `generate` and a model's layers see of it.

`hooks.py` hangs the cache into a model; `support.py` says which models fit, `history.py` what was taken in so far.
"""

import warnings
from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from rocketkv.attention import LayerCache
from rocketkv.checks import check_config as check_rocketkv_config
from rocketkv.checks import check_rows
from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError, UnsupportedError
from rocketkv.history import UNKNOWN, History, join
from rocketkv.ops import take_tokens
from rocketkv.stats import CacheStats, LayerStats
from rocketkv.support import check_config, is_full
from rocketkv.versions import dependency


class Call(NamedTuple):
    """What the hook knows of the forward pass that a layer is about to take part in."""

    padding: Tensor | None = None  # [B] int64, padded columns among the new ones
    order: Tensor | None = None  # [B, T] int64, the new columns with the padded ones first; None: they are


class Pass(NamedTuple):
    """A forward pass that has begun, and what was there before it."""

    ids: Tensor  # [B, T] integers, the new columns
    mask: Tensor | None  # [B, seen + T] bool, False in padded columns; None: there are none
    plain_layers: dict[int, DynamicLayer]  # transformers' own, as they were


class RocketKVLayer(CacheLayerMixin):
    """A layer of the model's cache that computes its attention itself, through a `LayerCache`."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: LayerCache, window: int | None = None) -> None:
        super().__init__()
        self.cache = cache
        self.window = window  # of a sliding-window layer whose window covers the model's whole context
        self.call: Call | None = None  # set by the hook, taken by the attention function

    @property
    def is_initialized(self) -> bool:
        """Whether the layer has taken in a prompt."""
        return self.cache.num_seen > 0

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Nothing to do: transformers says so, the cache knows it."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer starts with its first prompt."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Pass the new tokens `[B, Hkv, T, D]` on as they are; the attention function will store them.

        Raises:
            UnsupportedError: no hook of `enable` has seen the forward pass.
        """
        if self.call is None:
            known = dependency("transformers")
            raise UnsupportedError(
                "a RocketKVCache reached a layer of a model, but no hook of rocketkv.enable has seen the forward pass; "
                "call rocketkv.enable(model) first. If the model is enabled, then the transformers at hand, "
                f"{known.installed}, hands caches on in a way of its own; install a tested version, {known.tested}."
            )
        return key_states, value_states

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped; our step runs uncompiled
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of the new tokens, `[B, Hq, T, D]`, through the compressed cache."""
        assert self.call is not None
        padding, order = self.call
        if query.shape[2] == 1 and self.cache.num_seen > 0 and not self.cache.awaits_prompt:
            output = self.cache.decode(query, key, value, scale=scale)
        elif order is None:
            output = self.cache.prefill(query, key, value, padding=padding, scale=scale)
        else:
            order = order.to(query.device)  # of this layer, where a device map has several
            query, key, value = (take_columns(x, order) for x in (query, key, value))
            output = self.cache.prefill(query, key, value, padding=padding, scale=scale)
            output = take_columns(output, order.argsort(1))
        self.call = None  # only now: a call that is left tells of a pass that broke off
        return output

    def end_turn(self) -> None:
        """Let the next prompt be a turn of its own; see `RocketKVCache.end_turn`."""
        self.cache.just_prefilled = False

    def copy(self) -> "RocketKVLayer":
        """An independent layer in the same state."""
        return RocketKVLayer(self.cache.copy(), self.window)

    def fork(self, config: RocketKVConfig) -> "RocketKVLayer":
        """A layer with the same past that compresses as `config` says; see `LayerCache.fork`."""
        return RocketKVLayer(self.cache.fork(config), self.window)

    def only_decoded_since(self, row_seen: Sequence[int]) -> bool:
        """Whether the tokens after the first `row_seen` of each row were decoded since the last prompt."""
        return self.cache.only_decoded_since(row_seen)

    def check_rewind(self, row_seen: Sequence[int]) -> None:
        """Refuse what `rewind` cannot do."""
        self.cache.check_rewind(row_seen)

    def rewind(self, num_seen: int, row_seen: Sequence[int]) -> None:
        """Forget all but the first columns, `num_seen` of them; see `LayerCache.rewind`."""
        self.cache.rewind(num_seen, row_seen)
        self.call = None

    @property
    def part_seen(self) -> set[int]:
        """Columns seen by the parts of the layer: one number, unless a pass broke off inside."""
        return {self.cache.num_seen}

    def get_seq_length(self) -> int:
        """Columns seen, padding included: what positions and masks of transformers count in."""
        return self.cache.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No columns: this layer's mask is its own business, so none is to be made (see `_mask`)."""
        return 0, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self.call = None

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
        """Refused: evicted tokens do not come back.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "a RocketKVCache cannot be rolled back, so assisted decoding does not work with it; "
            "generate without assistant_model and prompt_lookup_num_tokens, or use a DynamicCache."
        )

    def activate_past_recording(self) -> None:
        """Refused: transformers asks for this when it is going to roll the cache back."""
        self.crop(0)

    def stats(self) -> LayerStats:
        """What the layer holds and reads."""
        working = self.cache.working
        if working is None:
            return LayerStats()
        num_kv_heads = working.lengths.shape[1]
        full_bytes = 2 * working.key_bytes * num_kv_heads * sum(working.row_seen)
        return LayerStats(
            num_seen=sum(working.row_seen) / len(working.row_seen),
            num_stored=float(working.lengths.double().mean()),
            kv_bytes=self.cache.kv_bytes,
            read_bytes=self.cache.read_bytes,
            full_kv_bytes=full_bytes,
            full_read_bytes=full_bytes,
        )


class RocketKVCache(DynamicCache):
    """A compressed cache for `model.generate(..., cache=cache)` of an enabled model.

    Versions of transformers before 5.24 call the argument `past_key_values`.

    Full-attention layers are compressed; sliding-window layers stay as transformers has them. A second `generate` with
    the same cache is the next turn of the conversation: it is given the whole text so far, with what is new at its end.
    One cache serves one conversation, or batch, at a time. `copy.copy`, `copy.deepcopy` and `pickle` make independent
    caches in the same state.

    Args:
        config: the model's configuration, `model.config`.
        rocketkv_config: how to compress.
        keep_queries: last queries of each prompt to keep for `fork`, in `multi_turn` only; 0: none.

    Attributes:
        history: the token ids taken in so far.

    Raises:
        InputError: config is no configuration of transformers.
        ConfigError: rocketkv_config is no `RocketKVConfig`.
        UnsupportedError: the architecture does not fit.
    """

    def __init__(self, config: PreTrainedConfig, rocketkv_config: RocketKVConfig, *, keep_queries: int = 0) -> None:
        check_config(config)
        check_rocketkv_config(rocketkv_config)
        super().__init__(config=config)
        self.model_config = config
        self.config = rocketkv_config
        self.keep_queries = keep_queries
        self.layers[:] = [_compressed(layer, config, rocketkv_config, keep_queries) for layer in self.layers]
        self.history = History()
        self.noted: tuple[Tensor | None, Any] = (
            None,
            None,
        )  # ids and mask that the model was given, for its decoder's hook
        self._pass: Pass | None = None  # begun and not finished
        self._decoder: ref[PreTrainedModel] | None = None  # what has filled the cache; None: nothing, or not known

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has taken in a prompt."""
        return all(layer.is_initialized for layer in self.layers)

    @property
    def compressed_layers(self) -> list[RocketKVLayer]:
        """The layers that are compressed, in order."""
        return [layer for layer in self.layers if isinstance(layer, RocketKVLayer)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included."""
        layer = self.layers[layer_idx] if layer_idx else self.compressed_layers[0]  # a refused pass leaves these alone
        return int(layer.get_seq_length())

    def stats(self) -> CacheStats:
        """What the cache holds and reads, per layer and in all, beside what a full cache would."""
        return cache_stats(self)

    def reset(self) -> None:
        """Forget everything, sliding-window layers included (some versions of transformers only zero those)."""
        self.layers[:] = RocketKVCache(self.model_config, self.config, keep_queries=self.keep_queries).layers
        self.history = History()
        self._pass = self._decoder = None

    def copy(self) -> "RocketKVCache":
        """An independent cache in the same state.

        Raises:
            InputError: a forward pass broke off half way; so for `fork` and the methods that select rows.
        """
        self._recover()
        return self._like(
            self.config,
            [layer.copy() if isinstance(layer, RocketKVLayer) else deepcopy(layer) for layer in self.layers],
        )

    def __copy__(self) -> "RocketKVCache":
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> "RocketKVCache":
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        self._recover()
        return {**vars(self), "noted": (None, None), "_decoder": None}

    def end_turn(self) -> None:
        """Say that the next prompt is a turn of its own, though nothing was decoded since the last one."""
        for layer in self.compressed_layers:
            layer.end_turn()

    def join_pieces(self) -> None:
        """Count all prompts so far as pieces of one; see `LayerCache.join_pieces`."""
        for layer in self.compressed_layers:
            layer.cache.join_pieces()

    def fork(self, rocketkv_config: RocketKVConfig) -> "RocketKVCache":
        """A cache with the same past that compresses as `rocketkv_config` says; this one stays as it is.

        One prefill of a long text can so serve many questions and many ways to compress. Right after a prompt whose
        last queries were kept (`keep_queries`) the fork is ready to decode, as if it had taken in the prompt itself;
        else it starts with its next prompt. See `LayerCache.fork`.

        Raises:
            InputError: this cache is not `multi_turn` or a stack, or the fork would need queries that were not kept.
        """
        self._recover()
        return self._like(
            rocketkv_config,
            [
                layer.fork(rocketkv_config) if isinstance(layer, RocketKVLayer) else deepcopy(layer)
                for layer in self.layers
            ],
        )

    def _like(self, rocketkv_config: RocketKVConfig, layers: list[Any]) -> "RocketKVCache":
        """A cache with the same past in other layers."""
        other = RocketKVCache(self.model_config, rocketkv_config, keep_queries=self.keep_queries)
        other.layers[:] = layers
        other.history, other._decoder = self.history.copy(), self._decoder
        return other

    def follow(self, caches: Sequence["RocketKVCache"]) -> None:
        """Take over what is known of the past of several caches, whose rows this one has now."""
        self.history = join([cache.history for cache in caches])
        self._decoder = caches[0]._decoder

    def rewind_to(self, ids: Tensor) -> int:
        """Forget all that does not belong to a text, so that `generate` can continue with that text.

        The longest beginning that the text has in common with what was taken in stays, without the text's last token,
        or, where tokens of a prompt go, without its last `window_size`: `generate` takes those in anew. So a chat
        template that drops earlier thoughts, an answer that is to be given again, or a forward pass that broke off need
        not cost the conversation.

        Args:
            ids: `[B, L]` integers, the text so far, as it will be given to `generate`; padded as it was.

        Returns:
            Columns that stay, 0 to L - 1.

        Raises:
            InputError: ids do not fit the cache's rows, or tokens of a prompt are to go from a `single_turn` cache.
            UnsupportedError: sliding-window layers have dropped what would be needed.
        """
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape:
            raise InputError("rewind_to takes the ids of a text, a tensor of integers [B, L]; give those for generate.")
        rows = self.history.num_rows
        if rows not in (None, ids.shape[0]):
            raise InputError(f"the cache holds {rows} rows, not {ids.shape[0]}; give as many.")
        if rows is None:
            self.reset()
            return 0
        keep = min(self.history.num_common(ids), ids.shape[1] - 1)
        counts = self.history.num_tokens(keep)
        goes_on = keep == self.history.num_columns or min(counts) == 0
        if not goes_on and not all(layer.only_decoded_since(counts) for layer in self.compressed_layers):
            keep = max(0, min(keep, ids.shape[1] - self.config.window_size))
            counts = self.history.num_tokens(keep)
        if keep == 0 or min(counts) == 0:
            self.reset()
            return 0
        plain_layers = {} if self._pass is None else self._pass.plain_layers
        plain = {i: plain_layers.get(i, layer) for i, layer in self._plain_layers().items()}
        num_dropped = self.history.num_columns - keep
        for i, layer in plain.items():
            if num_dropped > 0 and layer.keys.shape[2] < layer.get_seq_length():
                raise UnsupportedError(
                    f"layer {i} has a sliding window and has dropped what came before it, so the cache cannot go back "
                    "to an earlier token; call cache.reset() and give the whole text."
                )
        for compressed in self.compressed_layers:
            compressed.check_rewind(counts)
        for compressed in self.compressed_layers:
            compressed.rewind(keep, counts)
        for i, layer in plain.items():
            self.layers[i] = _first_columns(layer, keep)
        self.history.truncate(keep)
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
            layer.batch_select_indices(indices)
        self.history.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.history.num_rows is not None:
            self.batch_select_indices(torch.arange(self.history.num_rows).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Refused before any layer changes; see `RocketKVLayer.crop`."""
        self.compressed_layers[0].activate_past_recording()

    def check_decoder(self, decoder: PreTrainedModel) -> None:
        """Refuse a decoder that this cache was not made for, or that has not filled it.

        Raises:
            InputError: layers, windows, KV heads or head_dim differ, or another model has filled the cache.
        """
        if self._decoder is not None and self._decoder() is decoder:
            return
        own, other = (_layout(config) for config in (self.model_config, decoder.config))
        if len(own) != len(other):
            raise InputError(
                f"the cache has {len(own)} layers, the model {len(other)}; "
                "make it with RocketKVCache(model.config, ...)."
            )
        for i, (mine, its) in enumerate(zip(own, other, strict=True)):
            for name, a, b in zip(_Layout._fields, mine, its, strict=True):
                if a != b:
                    raise InputError(
                        f"the cache was made for {name.replace('_', ' ')} {a} in layer {i}, but the model has {b}; "
                        "make it with RocketKVCache(model.config, ...)."
                    )
        if self._decoder is not None and self.history.num_columns > 0:
            raise InputError(
                f"another model has filled this cache, not this {type(decoder).__name__}; "
                "go on with that one, or call cache.reset()."
            )
        self._decoder = ref(decoder)

    def check_continued(self, ids: Tensor) -> None:
        """Refuse a text that does not continue what was taken in.

        Args:
            ids: `[B, L]` integers, the whole text so far.

        Raises:
            InputError: it begins otherwise, or nothing of it is new.
        """
        self._recover()
        rows, seen = self.history.num_rows, self.history.num_columns
        if rows is None:
            return
        repeats, remainder = divmod(rows, ids.shape[0])
        common = 0 if remainder else self.history.num_common(ids.repeat_interleave(repeats, 0))
        if common == seen < ids.shape[1]:
            return
        if rows != ids.shape[0]:
            raise self._other_rows(ids.shape[0])
        if common == ids.shape[1]:
            problem = f"all {common} tokens of the text were taken in already, so there is nothing to go on from"
        else:
            problem = (
                f"the cache has taken in {seen} tokens, and the text of {ids.shape[1]} differs from them at token "
                f"{common}"
            )
        raise InputError(
            f"{problem}; give all that the cache has taken in, the last answer included, followed by what is new. "
            "To go back to what they have in common call cache.rewind_to(ids), to begin anew cache.reset()."
        )

    def begin(self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None) -> None:
        """Announce a forward pass to every compressed layer; called by the hook of `enable`. What raises costs nothing.

        Args:
            tokens: `[B, T]` integers, the new columns; UNKNOWN where there is no id.
            attention_mask: `[B, seen + T]`, zero in padded columns; None: no padding.
            position_ids: `[B, T]` or `[1, T]` integers, if given.

        Raises:
            InputError: the mask, the batch or positions do not fit, nothing is new, or an earlier pass broke off.
            UnsupportedError: the mask is not one of left padding.
        """
        self._recover()
        layers = self.compressed_layers
        rows, num_new = tokens.shape
        adopted = layers[0].get_seq_length() - self.history.num_columns
        if adopted > 0:  # they came through `LayerCache.adopt`
            self.history.append(torch.full((self.history.num_rows or rows, adopted), UNKNOWN), self.history.mask)
        seen = self.history.num_columns
        if num_new == 0:
            raise InputError("no new tokens came with this cache; give one at least.")
        if self.history.num_rows not in (None, rows):
            raise self._other_rows(rows)
        for layer in layers:
            if layer.window is not None and seen + num_new > layer.window:
                raise UnsupportedError(
                    f"{seen + num_new} tokens are more than this model's sliding window of {layer.window}; "
                    "give a shorter text or use transformers' DynamicCache."
                )
        call, mask = self._read_padding(tokens, attention_mask)
        if position_ids is not None and num_new > 1 and seen > 0:
            self._check_positions(position_ids, num_new, call.padding)
        is_short = self.config.mode == "single_turn" or num_new < self.config.window_size
        if num_new > 1 and layers[0].cache.just_prefilled and is_short:
            warnings.warn(
                "a second prompt before any token was decoded: each forward pass is its own turn, so a prompt given in "
                "chunks is not what it is in one piece; use mode='multi_turn' and a last chunk of window_size or more.",
                stacklevel=2,
            )
        self._pass = Pass(tokens, mask, {i: copy(layer) for i, layer in self._plain_layers().items()})
        for layer in layers:
            layer.call = call

    def finish(self) -> bool:
        """Note that every layer has taken part in the pass that has begun; False, and no note, if one has not."""
        if self._pass is None or any(layer.call is not None for layer in self.compressed_layers):
            return False
        self.history.append(self._pass.ids, self._pass.mask)
        self._pass = None
        return True

    def _recover(self) -> None:
        """Make good a pass that has begun and not finished: if no layer has taken it in, or all have.

        Raises:
            InputError: some have.
        """
        if self._pass is None:
            return
        before, num_new = self.history.num_columns, self._pass.ids.shape[1]
        seen = [
            layer.part_seen if isinstance(layer, RocketKVLayer) else {layer.get_seq_length()} for layer in self.layers
        ]
        if all(columns == {before + num_new} for columns in seen) and self.finish():
            return
        compressed = [i for i, layer in enumerate(self.layers) if isinstance(layer, RocketKVLayer)]
        if any(seen[i] != {before} for i in compressed):
            broken = next((i for i, columns in enumerate(seen) if columns != {before + num_new}), len(seen) - 1)
            way_out = "" if before == 0 else ", or cache.rewind_to(ids) with the text that it had seen before"
            raise InputError(
                f"in layer {broken}, an earlier forward pass with this cache broke off half way; call cache.reset() "
                f"and start anew{way_out}."
            )
        for i, layer in self._pass.plain_layers.items():
            self.layers[i] = layer
        self.withdraw()

    def withdraw(self) -> None:
        """Take back the announcement of a pass that no layer has taken part in."""
        self._pass = None
        for layer in self.compressed_layers:
            layer.call = None

    def _plain_layers(self) -> dict[int, DynamicLayer]:
        return {i: layer for i, layer in enumerate(self.layers) if not isinstance(layer, RocketKVLayer)}

    def _other_rows(self, rows: int) -> InputError:
        return InputError(
            f"the cache holds {self.history.num_rows} rows, but {rows} came; give as many (after beams or "
            "num_return_sequences the cache has a row for each), choose some by "
            "cache.batch_select_indices(torch.tensor([0])), or call cache.reset()."
        )

    def _check_positions(self, position_ids: Tensor, num_new: int, padding: Tensor | None) -> None:
        """Refuse new tokens that stand where others stood."""
        if position_ids.dim() != 2:  # of models whose positions are no numbers of tokens
            return
        seen = torch.tensor(self.history.num_tokens(self.history.num_columns), device=position_ids.device)
        last = seen + num_new - 1 - (0 if padding is None else padding.to(seen.device))
        if bool((position_ids[:, -1] < last).any()):
            raise InputError(
                f"position_ids end at {position_ids[:, -1].tolist()}, but the cache has seen {seen.tolist()} tokens "
                f"and {num_new} came; give the new tokens only, or call cache.reset() to take in the text anew."
            )

    def _read_padding(self, tokens: Tensor, attention_mask: Tensor | None) -> tuple[Call, Tensor | None]:
        """Find the padded columns among the new ones, and the mask of all; see `begin` for arguments and errors."""
        seen, seen_mask, num_new = self.history.num_columns, self.history.mask, tokens.shape[1]
        if attention_mask is None:
            return Call(), None if seen_mask is None else pad(seen_mask, (0, num_new), value=True)
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            raise UnsupportedError(
                "a RocketKVCache makes its own masks; give a two-dimensional attention_mask of zeros and ones, or none."
            )
        if attention_mask.shape != (tokens.shape[0], seen + num_new):
            raise InputError(
                f"attention_mask has {attention_mask.shape[1]} columns, but the cache has seen {seen} and {num_new} "
                f"are new; give {seen + num_new}."
                if attention_mask.shape[1] != seen + num_new
                else f"attention_mask has {attention_mask.shape[0]} rows for {tokens.shape[0]}; give as many."
            )
        mask = attention_mask.bool()
        new, past = mask[:, seen:], mask[:, :seen]
        if not bool(new[:, -1].all()):
            if bool(new.any(1).all()):
                raise UnsupportedError(
                    "attention_mask ends in zeros: the prompts are padded at the right; "
                    "pad at the left (tokenizer.padding_side='left')."
                )
            raise UnsupportedError(
                f"attention_mask leaves a row without a token among the {num_new} new columns: they are all padding; "
                "take in the prompts in one piece, without prefill_chunk_size, or in chunks longer than the padding."
            )
        if not torch.equal(past, torch.ones_like(past) if seen_mask is None else seen_mask.to(past.device)):
            raise UnsupportedError(
                "attention_mask hides or reveals tokens that the cache has already taken in; "
                "keep the mask of earlier columns as it was, ones for generated tokens."
            )
        if bool(new.all()):
            return Call(), mask
        is_left = bool((new[:, 1:] >= new[:, :-1]).all())  # else a token of the last answer stands before the padding
        order = None if is_left else new.to(torch.uint8).argsort(dim=1, stable=True)
        return Call(num_new - new.sum(1), order), mask


def cache_stats(cache: DynamicCache) -> CacheStats:
    """What a `RocketKVCache`, or for comparison transformers' own dynamic cache, holds and reads."""
    return CacheStats(
        [layer.stats() if isinstance(layer, RocketKVLayer) else plain_stats(layer) for layer in cache.layers]
    )


def head_dims(config: PreTrainedConfig) -> list[int]:
    """Channels of a key, layer by layer."""
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "per_layer_config", None)  # where transformers knows that layers may differ
    return [
        getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        for layer in (layers or [text] * text.num_hidden_layers)
    ]


class _Layout(NamedTuple):
    """What a layer's keys and values look like."""

    layer_kind: str
    sliding_window: int | None
    KV_heads: int
    head_dim: int


def _layout(config: PreTrainedConfig) -> list[_Layout]:
    """What a model caches, layer by layer."""
    text = config.get_text_config(decoder=True)
    parts = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers
    kv_heads = [getattr(part, "num_key_value_heads", None) or part.num_attention_heads for part in parts]
    return [
        _Layout(type(layer).__name__, getattr(layer, "sliding_window", None), heads, head_dim)
        for layer, heads, head_dim in zip(DynamicCache(config=config).layers, kv_heads, head_dims(config), strict=True)
    ]


def _first_columns(layer: DynamicLayer, num_columns: int) -> DynamicLayer:
    """A layer of transformers' own that has seen only its first columns, all of which it holds."""
    if layer.get_seq_length() == num_columns:
        return layer
    first = copy(layer)
    first.keys, first.values = (x[:, :, :num_columns] for x in (layer.keys, layer.values))
    if hasattr(first, "cumulative_length"):
        first.cumulative_length = num_columns
    return first


def join_rows(layers: Sequence[DynamicLayer]) -> DynamicLayer:
    """A layer of transformers' own with the rows of several that have seen equally many columns; they stay as is."""
    joined = copy(layers[0])
    joined.keys, joined.values = (torch.cat([getattr(x, name) for x in layers]) for name in ("keys", "values"))
    return joined


def take_columns(tokens: Tensor, order: Tensor) -> Tensor:
    """Reorder the columns of `tokens` `[B, H, T, D]` row by row, as `order` `[B, T]` int64 says."""
    return take_tokens(tokens, order[:, None].expand(-1, tokens.shape[1], -1))


def _compressed(
    layer: DynamicLayer, config: PreTrainedConfig, rocketkv_config: RocketKVConfig, keep_queries: int
) -> Any:
    """The layer to use in place of one of transformers' own: a compressed one if it attends to everything."""
    if not is_full(layer, config.get_text_config(decoder=True)):
        return layer
    return RocketKVLayer(LayerCache(rocketkv_config, keep_queries), window=getattr(layer, "sliding_window", None))


def plain_stats(layer: DynamicLayer, rows: int = 1) -> LayerStats:
    """A layer of transformers' own, or one of its `rows`: held and read whole, as in a full cache."""
    if not layer.is_initialized:
        return LayerStats()
    num_bytes = (layer.keys.nbytes + layer.values.nbytes) // rows
    return LayerStats(layer.get_seq_length(), layer.keys.shape[2], num_bytes, num_bytes, num_bytes, num_bytes)
