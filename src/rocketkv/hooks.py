"""The switch that lets a model of transformers use a `RocketKVCache`. Only this file hangs anything into a model.

The way of a call: `enable` hangs a hook before the forward pass of the model and one before its decoder's. The first
notes what the model was given: token ids and their mask; the second announces the pass to the cache and passes it along
as a keyword argument; the decoder hands it down to the attention function that `enable` registered; that function finds
the layer's cache and calls its prefill or decode. The model's own `generate` stands behind ours, which looks at the
conversation before anything is computed. Nothing is global but what a running `generate` was given: a model without a
`RocketKVCache` among its arguments computes exactly what it computed before.
"""

import warnings
from contextvars import ContextVar
from functools import cache as once
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rocketkv.errors import InputError, UnsupportedError
from rocketkv.hf import RocketKVCache, RocketKVLayer
from rocketkv.history import UNKNOWN
from rocketkv.support import check_model, joins_images, rope_limit, unsupported
from rocketkv.versions import CACHE_ARGUMENT, CACHE_ARGUMENTS, dependency

NAME = "rocketkv"  # our attention implementation in the registries of transformers
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_REFUSED_OPTIONS = ("softcap", "s_aux", "position_bias")  # what our attention would have to ignore


class Given(NamedTuple):
    """What a running `generate` was given."""

    model: PreTrainedModel
    decoder: PreTrainedModel
    cache: RocketKVCache


_given: ContextVar[Given | None] = ContextVar("given", default=None)


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model use a `RocketKVCache`; with any other cache, or none, it computes what it did before.

    With a version of transformers newer than the tested ones it warns once.

    Args:
        model: a decoder of transformers, with the `sdpa` attention implementation.

    Returns:
        The same model.

    Raises:
        InputError: this is no model of transformers.
        UnsupportedError: the architecture does not fit; the message names it and says why.
    """
    if hasattr(model, "_rocketkv"):
        return model
    decoder = check_model(model)
    name = type(model).__name__
    implementation = model.config._attn_implementation
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
    model._rocketkv = [
        model.register_forward_pre_hook(before_model, with_kwargs=True),
        decoder.register_forward_pre_hook(before_forward, with_kwargs=True),
        decoder.register_forward_hook(after_forward, with_kwargs=True),
    ]
    for method in _METHODS:
        if hasattr(model, method.__name__):
            setattr(model, method.__name__, MethodType(method, model))
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
        for method in _METHODS:
            vars(model).pop(method.__name__, None)
        model.set_attn_implementation("sdpa")
        model._compiled_call_impl = None  # what `rocketkv.fast.accelerate` put there
        del model._rocketkv
    return model


@wraps(GenerationMixin.generate)
def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's `generate`, which a compressed cache that it is given must not leave unused or misread."""
    plain = type(self).generate
    cache = _passed_cache(kwargs)
    if cache is None:
        return plain(self, *args, **kwargs)
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    mask, embeddings = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if embeddings is not None:
        ids = torch.full(embeddings.shape[:2], UNKNOWN, device=embeddings.device)
    # As transformers reads it: a mask that is longer than the text says that the text is only what is new.
    if isinstance(ids, Tensor) and ids.dim() == 2 and (mask is None or mask.shape[-1] == ids.shape[1]):
        cache.check_continued(ids)
    token = _given.set(Given(self, self.get_decoder(), cache))
    try:
        return plain(self, *args, **kwargs)
    finally:
        _given.reset(token)


@wraps(GenerationMixin.init_continuous_batching)
def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's method behind `generate_batch`: until its manager stops, the model attends as it did before."""
    self.set_attn_implementation("sdpa")
    try:
        manager = type(self).init_continuous_batching(self, *args, **kwargs)
    except BaseException:
        self.set_attn_implementation(NAME)
        raise
    manager._original_attn_impl = NAME  # to which it returns when it stops
    return manager


_METHODS = (generate, init_continuous_batching)


def before_model(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Note what the model was given, as its decoder may get it in another form; give back a cache that went missing."""
    given, cache = _given.get(), _passed_cache(kwargs)
    if given is not None and given.model is model and cache is not given.cache:
        if kwargs.get(CACHE_ARGUMENT) is not None or given.cache.get_seq_length() > 0:
            raise _left_unused(model, kwargs.get(CACHE_ARGUMENT))
        cache = given.cache  # dropped for what it may hold, but it is empty
        kwargs = {**kwargs, CACHE_ARGUMENT: cache}
    if cache is None:
        return None
    if any(_has_any(kwargs.get(name)) for name in _TOKEN_TYPES) and joins_images(type(model)):
        raise unsupported(type(model).__name__, "the tokens of an image attend to later ones of it; give text alone")
    cache.noted = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
    return args, kwargs


def before_forward(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Announce the pass to the cache and hand the cache down to the attention function."""
    if "rocketkv_cache" in kwargs:
        return None  # a compiled step, announced before it began
    return _announce(decoder, args, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped; this looks at what no graph holds
def _announce(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check all that can be refused before anything changes, read the padding and announce the pass to the cache."""
    if any(isinstance(arg, RocketKVCache) for arg in args):
        raise InputError(f"pass a RocketKVCache by keyword: model(..., {CACHE_ARGUMENT}=cache).")
    given, cache = _given.get(), _passed_cache(kwargs)
    if given is not None and given.decoder is decoder and cache is not given.cache:
        raise _left_unused(given.model, kwargs.get(CACHE_ARGUMENT))
    if cache is None:
        return None
    if len(args) > 1:
        raise InputError("with a RocketKVCache pass everything but input_ids by keyword, attention_mask too.")
    if decoder.config._attn_implementation != NAME:
        raise UnsupportedError(
            f"{type(decoder).__name__} was enabled, but its attn_implementation is now "
            f"{decoder.config._attn_implementation!r}; call rocketkv.disable(model) and rocketkv.enable(model)."
        )
    if kwargs.get("use_cache") is False:
        raise InputError("use_cache=False contradicts the RocketKVCache that came with it; leave one of them out.")
    if kwargs.get("output_attentions"):
        raise UnsupportedError("a RocketKVCache gives no attention weights; call with output_attentions=False.")
    cache.check_decoder(decoder)
    tokens, attention_mask = _tokens_and_mask(cache, args, kwargs)
    limit = rope_limit(decoder.config)
    seen = cache.get_seq_length()
    if limit is not None and 0 < seen <= limit < seen + tokens.shape[1]:
        raise _crosses(type(decoder).__name__, limit)
    cache.begin(tokens, attention_mask, kwargs.get("position_ids"))
    return args, {**kwargs, "rocketkv_cache": cache}


def _tokens_and_mask(cache: RocketKVCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The new tokens `[B, T]` and the mask of a decoder's pass, from what its model was given where it does not say."""
    noted_ids, noted_mask = cache.noted
    cache.noted = None, None
    tokens, attention_mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
    if tokens is None:
        embeddings = kwargs["inputs_embeds"]
        if noted_ids is not None and noted_ids.shape == embeddings.shape[:2]:
            tokens = noted_ids
        else:
            tokens = torch.full(embeddings.shape[:2], UNKNOWN, device=embeddings.device)
    is_prepared = attention_mask is None or isinstance(attention_mask, dict)  # by a wrapper, for layers of other kinds
    if is_prepared and noted_ids is not None and noted_ids.shape == tokens.shape:
        attention_mask = noted_mask
    return tokens, attention_mask


def _has_any(x: Any) -> bool:
    return isinstance(x, Tensor) and bool(x.any())


def _left_unused(model: PreTrainedModel, other: object) -> UnsupportedError:
    """What to say where `generate` was given a cache that does not come to the model."""
    name = type(model).__name__
    limit = getattr(model.config, "original_max_position_embeddings", None)
    if other is None and limit is not None:
        return _crosses(name, limit)
    what = "no cache" if other is None else f"a {type(other).__name__}"
    return unsupported(
        name, f"generate was given a RocketKVCache, but the model gets {what} instead, as prefix tuning has it"
    )


def _crosses(name: str, limit: int) -> UnsupportedError:
    return UnsupportedError(
        f"{name} turns its keys otherwise in texts of more than {limit} tokens, so a cache cannot go on from fewer to "
        f"more; stay within {limit}, or call cache.reset() and give the whole text, which is then longer, at once."
    )


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
    if cache is not None and not _finish(cache):
        raise unsupported(type(decoder).__name__, "some layers bypass transformers' attention interface")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as above
def _finish(cache: RocketKVCache) -> bool:
    return cache.finish()


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
            raise unsupported(type(module).__name__, f"its attention needs {option}")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise unsupported(type(module).__name__, "its attention is bidirectional")
    if kwargs.get("sliding_window") != layer.window:
        raise unsupported(type(module).__name__, "its sliding window is not the one of its configuration")
    if attention_mask is not None or dropout > 0:
        raise UnsupportedError(
            f"{type(module).__name__} passes {'dropout' if dropout > 0 else 'a mask of its own'} "
            "to a compressed layer; use model.eval() and left padding only."
        )
    if layer.call is None:
        raise unsupported(type(module).__name__, "it attends without updating its cache")
    if torch.is_autocast_enabled(query.device.type):
        output = _attend_under_autocast(layer, query, key, value, scaling)
    else:
        output = layer.attend(query, key, value, scaling)
    return output.transpose(1, 2).contiguous(), None


def _attend_under_autocast(
    layer: RocketKVLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    """Attention in the dtype of the cache, which is autocast's, as SDPA's, if the cache is empty."""
    device = query.device.type
    dtype = layer.cache.dtype or torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        output: Tensor = layer.attend(query.to(dtype), key.to(dtype), value.to(dtype), scaling)
    return output.to(query.dtype)


def _mask(*args: Any, kv_length: int, **kwargs: Any) -> Tensor | None:
    """The registered mask function: none for layers that report no columns (`get_mask_sizes`), else SDPA's."""
    return None if kv_length == 0 else sdpa_mask(*args, kv_length=kv_length, **kwargs)
