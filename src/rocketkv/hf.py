"""RocketKV in transformers: a cache for `generate` and the switch that lets a model use it. Only this file knows how.

The way of a call: `enable` hangs one hook before the decoder's forward. The hook reads the padding from the mask and
passes the cache along as a keyword argument; the decoder hands it down to the attention function that `enable`
registered; that function finds the layer's cache and calls its prefill or decode. Nothing is patched and nothing is
global: a model without a `RocketKVCache` among its arguments computes exactly what it computed before.
"""

import warnings
from collections.abc import Sequence
from copy import copy, deepcopy
from functools import cache as once
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rocketkv.attention import LayerCache
from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError, UnsupportedError
from rocketkv.ops import take_tokens
from rocketkv.stats import CacheStats, LayerStats
from rocketkv.versions import CACHE_ARGUMENT, CACHE_ARGUMENTS, dependency

NAME = "rocketkv"  # our attention implementation in the registries of transformers
_REFUSED_OPTIONS = ("softcap", "s_aux", "position_bias")  # what our attention would have to ignore


class Call(NamedTuple):
    """What the hook knows of the forward pass that a layer is about to take part in."""

    padding: Tensor | None = None  # [B] int64, padded columns among the new ones
    order: Tensor | None = None  # [B, T] int64, the new columns with the padded ones first; None: they are
    mask: Tensor | None = None  # [B, seen + T] bool, False in padded columns; None: there are none


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
        self.seen_mask: Tensor | None = None  # the mask of the last call, to tell when a later one contradicts it

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
        padding, order, self.seen_mask = self.call
        if query.shape[2] == 1 and self.cache.num_seen > 0:
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
        copied = copy(self)
        copied.cache = self.cache.copy()
        return copied

    def fork(self, config: RocketKVConfig) -> "RocketKVLayer":
        """A layer with the same past that compresses as `config` says; see `LayerCache.fork`."""
        forked = RocketKVLayer(self.cache.fork(config), self.window)
        forked.seen_mask = self.seen_mask
        return forked

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
        self.call = self.seen_mask = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch by the rows `beam_idx` (`[B]` int64), as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices` (`[B']` int64)."""
        self.cache.select_rows(indices)
        if self.seen_mask is not None:
            self.seen_mask = self.seen_mask.index_select(0, indices.to(self.seen_mask.device))

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
    the same cache is the next turn of the conversation. One cache serves one conversation, or batch, at a time.

    Args:
        config: the model's configuration, `model.config`.
        rocketkv_config: how to compress.
        keep_queries: last queries of each prompt to keep for `fork`, in `multi_turn` only; 0: none.

    Raises:
        UnsupportedError: the architecture does not fit.
    """

    def __init__(self, config: PreTrainedConfig, rocketkv_config: RocketKVConfig, *, keep_queries: int = 0) -> None:
        _check_architecture(config, config.model_type)
        super().__init__(config=config)
        self.model_config = config
        self.config = rocketkv_config
        self.keep_queries = keep_queries
        self.layers[:] = [_compressed(layer, config, rocketkv_config, keep_queries) for layer in self.layers]

    @property
    def compressed_layers(self) -> list[RocketKVLayer]:
        """The layers that are compressed, in order."""
        return [layer for layer in self.layers if isinstance(layer, RocketKVLayer)]

    def stats(self) -> CacheStats:
        """What the cache holds and reads, per layer and in all, beside what a full cache would."""
        return cache_stats(self)

    def reset(self) -> None:
        """Forget everything, sliding-window layers included (some versions of transformers only zero those)."""
        self.layers[:] = RocketKVCache(self.model_config, self.config, keep_queries=self.keep_queries).layers

    def copy(self) -> "RocketKVCache":
        """An independent cache in the same state."""
        copied = RocketKVCache(self.model_config, self.config, keep_queries=self.keep_queries)
        copied.layers[:] = [
            layer.copy() if isinstance(layer, RocketKVLayer) else deepcopy(layer) for layer in self.layers
        ]
        return copied

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
        forked = RocketKVCache(self.model_config, rocketkv_config, keep_queries=self.keep_queries)
        for i, layer in enumerate(self.layers):
            forked.layers[i] = layer.fork(rocketkv_config) if isinstance(layer, RocketKVLayer) else deepcopy(layer)
        return forked

    def activate_past_recording(self) -> None:
        """Refused before any layer changes; see `RocketKVLayer.crop`."""
        self.compressed_layers[0].activate_past_recording()

    def begin(self, num_new: int, attention_mask: Tensor | None) -> None:
        """Announce a forward pass of `num_new` columns to every compressed layer; called by the hook of `enable`.

        Raises:
            InputError: the mask does not fit, or an earlier pass broke off.
            UnsupportedError: the mask is not one of left padding.
        """
        layers = self.compressed_layers
        if any(layer.call is not None for layer in layers) or len({layer.get_seq_length() for layer in layers}) > 1:
            raise InputError(
                "an earlier forward pass with this cache broke off half way; call cache.reset() and start anew."
            )
        seen = layers[0].get_seq_length()
        for layer in layers:
            if layer.window is not None and seen + num_new > layer.window:
                raise UnsupportedError(
                    f"{seen + num_new} tokens are more than this model's sliding window of {layer.window}; "
                    "give a shorter text or use transformers' DynamicCache."
                )
        is_short = self.config.mode == "single_turn" or num_new < self.config.window_size
        if num_new > 1 and layers[0].cache.just_prefilled and is_short:
            warnings.warn(
                "a second prompt before any token was decoded: each forward pass is its own turn, so a prompt given in "
                "chunks is not what it is in one piece; use mode='multi_turn' and a last chunk of window_size or more.",
                stacklevel=2,
            )
        call = self._read_padding(num_new, attention_mask)
        for layer in layers:
            layer.call = call

    def _read_padding(self, num_new: int, attention_mask: Tensor | None) -> Call:
        """Find the padded columns among the new ones in the mask `[B, seen + num_new]`; see `begin` for errors."""
        first = self.compressed_layers[0]
        seen, seen_mask = first.get_seq_length(), first.seen_mask
        if attention_mask is None:
            return Call(mask=None if seen_mask is None else pad(seen_mask, (0, num_new), value=True))
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            raise UnsupportedError(
                "a RocketKVCache makes its own masks; give a two-dimensional attention_mask of zeros and ones, or none."
            )
        if attention_mask.shape[1] != seen + num_new:
            raise InputError(
                f"attention_mask has {attention_mask.shape[1]} columns, but the cache has seen {seen} and {num_new} "
                f"are new; give {seen + num_new}."
            )
        mask = attention_mask.bool()
        new, past = mask[:, seen:], mask[:, :seen]
        if not bool(new[:, -1].all()):
            raise UnsupportedError(
                "attention_mask ends in zeros: the prompts are padded at the right; "
                "pad at the left (tokenizer.padding_side='left')."
            )
        if not torch.equal(past, torch.ones_like(past) if seen_mask is None else seen_mask):
            raise UnsupportedError(
                "attention_mask hides or reveals tokens that the cache has already taken in; "
                "keep the mask of earlier columns as it was, ones for generated tokens."
            )
        if bool(new.all()):
            return Call(mask=mask)
        is_left = bool((new[:, 1:] >= new[:, :-1]).all())  # else a token of the last answer stands before the padding
        order = None if is_left else new.to(torch.uint8).argsort(dim=1, stable=True)
        return Call(num_new - new.sum(1), order, mask)


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


def join_rows(layers: Sequence[DynamicLayer]) -> DynamicLayer:
    """A layer of transformers' own with the rows of several that have seen equally many columns; they stay as is."""
    joined = copy(layers[0])
    joined.keys, joined.values = (torch.cat([getattr(x, name) for x in layers]) for name in ("keys", "values"))
    return joined


def take_columns(tokens: Tensor, order: Tensor) -> Tensor:
    """Reorder the columns of `tokens` `[B, H, T, D]` row by row, as `order` `[B, T]` int64 says."""
    return take_tokens(tokens, order[:, None].expand(-1, tokens.shape[1], -1))


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model use a `RocketKVCache`; with any other cache, or none, it computes what it did before.

    With a version of transformers newer than the tested ones it warns once.

    Args:
        model: a decoder of transformers, with the `sdpa` attention implementation.

    Returns:
        The same model.

    Raises:
        UnsupportedError: the architecture does not fit; the message names it and says why.
    """
    if hasattr(model, "_rocketkv"):
        return model
    name = type(model).__name__
    _check_architecture(model.config, name)
    if not model._can_set_attn_implementation() or not getattr(model, "_supports_attention_backend", False):
        raise _unsupported(name, "its attention bypasses transformers' attention interface")
    implementation = model.config._attn_implementation
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        raise _unsupported(name, "its decoder cannot be told apart from its head")
    if implementation == NAME:
        raise UnsupportedError(
            f"{name} shares its configuration with a model that is enabled already; load or configure it on its own."
        )
    if implementation != "sdpa":
        raise UnsupportedError(
            f"{name} was loaded with attn_implementation={implementation!r}; load it with attn_implementation='sdpa'."
        )
    _warn_if_untested()
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    handles = [
        decoder.register_forward_pre_hook(before_forward, with_kwargs=True),
        decoder.register_forward_hook(after_forward, with_kwargs=True),
    ]
    model._rocketkv = handles
    return model


@once
def _warn_if_untested() -> None:
    """Say, once, that this transformers is not among the tested versions."""
    known = dependency("transformers")
    if not known.is_tested:
        warnings.warn(
            f"transformers {known.installed} is not among the versions that rocketkv was tested with, {known.tested}; "
            "if something fails, install one of those.",
            stacklevel=3,
        )


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable`; a model that is not enabled stays as it is."""
    if hasattr(model, "_rocketkv"):
        for handle in model._rocketkv:
            handle.remove()
        model.set_attn_implementation("sdpa")
        model._compiled_call_impl = None  # what `rocketkv.fast.accelerate` put there
        del model._rocketkv
    return model


def _unsupported(name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{name} is not supported: {reason}; use it with transformers' own DynamicCache.")


def _check_architecture(config: PreTrainedConfig, name: str) -> None:
    """Refuse, by name, what would be answered wrongly or has nothing to compress."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise _unsupported(name, "it is an encoder-decoder")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise _unsupported(name, "multi-head latent attention (MLA) caches no plain keys and values")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise _unsupported(name, "it caps attention logits (softcap)")
    if getattr(text, "alibi", False):
        raise _unsupported(name, "it adds position biases to the attention logits (ALiBi)")
    if getattr(text, "num_kv_shared_layers", None):
        raise _unsupported(name, "some of its layers share the cache of others")
    if not getattr(text, "is_causal", True):
        raise _unsupported(name, "its attention is bidirectional")
    layers = DynamicCache(config=config).layers
    for i, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise _unsupported(name, f"layer {i} keeps a {type(layer).__name__}, not plain keys and values")
    if not any(_is_full(layer, text) for layer in layers):
        raise _unsupported(name, "it has sliding-window layers only, so there is nothing to compress")


def _is_full(layer: DynamicLayer, config: PreTrainedConfig) -> bool:
    """Whether a layer attends to everything, be it through a window as long as the model's context."""
    return type(layer) is DynamicLayer or layer.sliding_window >= config.max_position_embeddings


def _compressed(
    layer: DynamicLayer, config: PreTrainedConfig, rocketkv_config: RocketKVConfig, keep_queries: int
) -> Any:
    """The layer to use in place of one of transformers' own: a compressed one if it attends to everything."""
    if not _is_full(layer, config.get_text_config(decoder=True)):
        return layer
    return RocketKVLayer(LayerCache(rocketkv_config, keep_queries), window=getattr(layer, "sliding_window", None))


def before_forward(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Read the padding, announce the pass to the cache and hand the cache down to the attention function."""
    if any(isinstance(arg, RocketKVCache) for arg in args):
        raise InputError(f"pass a RocketKVCache by keyword: model(..., {CACHE_ARGUMENT}=cache).")
    cache = _passed_cache(kwargs)
    if cache is None:
        return None
    if len(args) > 1:
        raise InputError("with a RocketKVCache pass everything but input_ids by keyword, attention_mask too.")
    if decoder.config._attn_implementation != NAME:
        raise UnsupportedError(
            f"{type(decoder).__name__} was enabled, but its attn_implementation is now "
            f"{decoder.config._attn_implementation!r}; call rocketkv.disable(model) and rocketkv.enable(model)."
        )
    if len(cache) != decoder.config.num_hidden_layers:
        raise InputError(
            f"the cache has {len(cache)} layers, the model {decoder.config.num_hidden_layers}; "
            "make it with RocketKVCache(model.config, ...)."
        )
    if kwargs.get("output_attentions"):
        raise UnsupportedError("a RocketKVCache gives no attention weights; call with output_attentions=False.")
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = args[0]
    cache.begin(tokens.shape[1], kwargs.get("attention_mask"))
    return args, {**kwargs, "rocketkv_cache": cache}


def _passed_cache(kwargs: dict[str, Any]) -> RocketKVCache | None:
    """The compressed cache among a forward pass's arguments, under whichever name transformers knows it by.

    Raises:
        InputError: it was passed under a name that this version of transformers ignores.
    """
    for name in CACHE_ARGUMENTS:
        cache = kwargs.get(name)
        if isinstance(cache, RocketKVCache):
            if CACHE_ARGUMENT == "past_key_values" and name != CACHE_ARGUMENT:
                raise InputError(
                    f"transformers {dependency('transformers').installed} ignores {name}=; pass {CACHE_ARGUMENT}=cache."
                )
            return cache
    return None


def after_forward(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Make sure that every compressed layer did attend through its cache."""
    cache = _passed_cache(kwargs)
    if cache is not None and any(layer.call is not None for layer in cache.compressed_layers):
        raise _unsupported(type(decoder).__name__, "some layers bypass transformers' attention interface")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    rocketkv_cache: RocketKVCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: compressed layers attend through their cache, all else through SDPA.

    Args:
        module: the model's attention layer, with its `layer_idx`.
        query: `[B, Hq, T, D]` float, after RoPE.
        key: `[B, Hkv, T, D]`, what the cache's `update` returned: the new tokens only, in a compressed layer.
        value: like `key`.
        attention_mask: what `_mask` made; None for a compressed layer.
        scaling: factor on the dot products; None: 1 / sqrt(D).
        dropout: must be 0 in a compressed layer.
        rocketkv_cache: what the hook handed down.
        kwargs: passed on to SDPA.

    Returns:
        `[B, T, Hq, D]` and no attention weights.
    """
    layer = None if rocketkv_cache is None else rocketkv_cache.layers[module.layer_idx]
    if not isinstance(layer, RocketKVLayer):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output, None
    for option in _REFUSED_OPTIONS:
        if kwargs.get(option) is not None:
            raise _unsupported(type(module).__name__, f"its attention needs {option}")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise _unsupported(type(module).__name__, "its attention is bidirectional")
    if kwargs.get("sliding_window") != layer.window:
        raise _unsupported(type(module).__name__, "its sliding window is not the one of its configuration")
    if attention_mask is not None or dropout > 0:
        raise UnsupportedError(
            f"{type(module).__name__} passes {'dropout' if dropout > 0 else 'a mask of its own'} "
            "to a compressed layer; use model.eval() and left padding only."
        )
    if layer.call is None:
        raise _unsupported(type(module).__name__, "it attends without updating its cache")
    return layer.attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


def _mask(*args: Any, kv_length: int, **kwargs: Any) -> Tensor | None:
    """The registered mask function: none for layers that report no columns (`get_mask_sizes`), else SDPA's."""
    return None if kv_length == 0 else sdpa_mask(*args, kv_length=kv_length, **kwargs)


def plain_stats(layer: DynamicLayer, rows: int = 1) -> LayerStats:
    """A layer of transformers' own, or one of its `rows`: held and read whole, as in a full cache."""
    if not layer.is_initialized:
        return LayerStats()
    num_bytes = (layer.keys.nbytes + layer.values.nbytes) // rows
    return LayerStats(layer.get_seq_length(), layer.keys.shape[2], num_bytes, num_bytes, num_bytes, num_bytes)
