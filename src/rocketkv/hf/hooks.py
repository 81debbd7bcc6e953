"""The hooks of an enabled model: they announce each forward pass to the compressed cache among its arguments."""

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rocketkv.errors import InputError, UnsupportedError
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.history import UNKNOWN
from rocketkv.hf.images import Noted, note, read_ahead
from rocketkv.hf.interface import NAMES
from rocketkv.hf.support import check_later_prompt, rope_limit, shared_layers, unsupported
from rocketkv.hf.versions import CACHE_ARGUMENT, CACHE_ARGUMENTS, dependency


class Given(NamedTuple):
    """What a running `generate` was given.

    Attributes:
        model: the model whose `generate` runs.
        decoder: its decoder.
        cache: the cache that must reach the decoder.
    """

    model: PreTrainedModel
    decoder: PreTrainedModel
    cache: RocketKVCache


given: ContextVar[Given | None] = ContextVar("given", default=None)


def before_model(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Note the ids and the mask for the decoder, which may get others; put back a cache that `generate` has dropped."""
    running, cache = given.get(), passed_cache(kwargs)
    if running is not None and running.model is model and cache is not running.cache:
        if kwargs.get(CACHE_ARGUMENT) is not None or running.cache.get_seq_length() > 0:
            raise _left_unused(model, kwargs.get(CACHE_ARGUMENT))
        cache = running.cache  # transformers dropped the cache, which may have tokens, but this one is empty
        kwargs = {**kwargs, CACHE_ARGUMENT: cache}
    if cache is None:
        return None
    cache.noted, kwargs = note(model, args, kwargs, cache.get_seq_length())
    return args, kwargs


def before_forward(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Announce the pass to the cache and hand the `Pass` down to the attention function."""
    if "rocketkv_pass" in kwargs:
        return None  # a compiled step, which was announced before it began
    return _announce(decoder, args, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped; this looks at objects outside of any graph
def _announce(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check all that can be refused before anything changes, read the padding and announce the pass to the cache."""
    if any(isinstance(arg, RocketKVCache) for arg in args):
        raise InputError(f"pass a RocketKVCache by keyword: model(..., {CACHE_ARGUMENT}=cache).")
    running, cache = given.get(), passed_cache(kwargs)
    if running is not None and running.decoder is decoder and cache is not running.cache:
        raise _left_unused(running.model, kwargs.get(CACHE_ARGUMENT))
    if cache is None:
        return None
    if len(args) > 1:
        raise InputError("with a RocketKVCache pass everything but input_ids by keyword, attention_mask too.")
    if decoder.config._attn_implementation not in NAMES.values():
        raise UnsupportedError(
            f"{type(decoder).__name__} was enabled, but its attn_implementation is now "
            f"{decoder.config._attn_implementation!r}; call rocketkv.disable(model) and rocketkv.enable(model)."
        )
    if kwargs.get("use_cache") is False:
        raise InputError("use_cache=False contradicts the RocketKVCache that came with it; leave one of them out.")
    if kwargs.get("output_attentions"):
        raise UnsupportedError("a RocketKVCache gives no attention weights; call with output_attentions=False.")
    cache.check_decoder(decoder)
    noted, cache.noted = cache.noted, Noted()
    tokens, attention_mask = _tokens_and_mask(noted, args, kwargs)
    limit = rope_limit(decoder.config)
    seen = cache.get_seq_length()
    if limit is not None and 0 < seen <= limit < seen + tokens.shape[1]:
        raise _crosses(type(decoder).__name__, limit)
    if seen > 0:
        check_later_prompt(decoder, tokens.shape[1], kwargs.get("position_ids"))
    current = cache.begin(tokens, attention_mask, kwargs.get("position_ids"))
    if getattr(decoder.config, "num_kv_shared_layers", None):
        current.share(shared_layers(decoder.config))
        if kwargs.get("logits_to_keep", 1) != 1:  # else their queries may be those of a few last columns, unmasked
            kwargs = {**kwargs, "logits_to_keep": 0}
    if noted.has_joined_images:
        mask = kwargs.get("attention_mask")
        current.ahead = read_ahead(mask, current.padding, tokens.shape[1])
        kwargs = {**kwargs, "attention_mask": {**mask, "full_attention": None} if isinstance(mask, dict) else None}
    return args, {**kwargs, "rocketkv_pass": current}


def _tokens_and_mask(noted: Noted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Return the new tokens `[B, T]` and the mask of a decoder's pass; those noted for the model fill gaps."""
    tokens, attention_mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
    if tokens is None:
        embeddings = kwargs["inputs_embeds"]
        if noted.ids is not None and noted.ids.shape == embeddings.shape[:2]:
            tokens = noted.ids
        else:
            tokens = torch.full(embeddings.shape[:2], UNKNOWN, device=embeddings.device)
    # A wrapper makes a dict of masks, one per kind of layer.
    is_prepared = attention_mask is None or isinstance(attention_mask, dict) or noted.has_joined_images
    if is_prepared and noted.ids is not None and noted.ids.shape == tokens.shape:
        attention_mask = noted.mask
    return tokens, attention_mask


def after_forward(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Finish the pass, and refuse a model of which a compressed layer did not attend through its cache."""
    cache = passed_cache(kwargs)
    if cache is not None and not _finish(cache):
        raise unsupported(type(decoder).__name__, "some layers bypass transformers' attention interface")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as above
def _finish(cache: RocketKVCache) -> bool:
    """Finish the pass of a cache; return whether every compressed layer has attended."""
    return cache.finish()


def _left_unused(model: PreTrainedModel, other: object) -> UnsupportedError:
    """Return the refusal of a model that does not get the cache that `generate` was given."""
    name = type(model).__name__
    limit = getattr(model.config, "original_max_position_embeddings", None)
    if other is None and limit is not None:
        return _crosses(name, limit)
    what = "no cache" if other is None else f"a {type(other).__name__}"
    return unsupported(
        name, f"generate was given a RocketKVCache, but the model gets {what} instead, as prefix tuning has it"
    )


def _crosses(name: str, limit: int) -> UnsupportedError:
    """Return the refusal of a text that grows beyond the length `limit` at which a model turns its keys otherwise."""
    return UnsupportedError(
        f"{name} turns its keys otherwise in texts of more than {limit} tokens, so a cache cannot go on from fewer to "
        f"more; stay within {limit}, or call cache.reset() and give the whole text, which is then longer, at once."
    )


def passed_cache(kwargs: dict[str, Any]) -> RocketKVCache | None:
    """Return the compressed cache among a forward pass's arguments, or None, under any of its names.

    Raises:
        InputError: the cache was passed under a name that this version of transformers ignores.
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
