"""The checks of `LayerCache`, which run before anything changes."""

from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

from rocketkv.cache import WorkingSet
from rocketkv.config import RocketKVConfig
from rocketkv.errors import ConfigError, InputError, UnsupportedError
from rocketkv.eviction import EvictionPolicy, keeps_what_it_may
from rocketkv.ops import LogitTerms
from rocketkv.ragged import Kept, RaggedTokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_SEEN = 1 << 30  # tokens; positions are stored in 32 bits, which leaves as many for the tokens to come
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOAT32 = torch.finfo(torch.float32)


def kind_of(query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: LogitTerms) -> tuple[object, ...]:
    """Return all that the checks of a step look at, except gradients; equal kinds need one check only.

    A tensor of sinks is known by its memory, so whoever keeps the kind keeps that tensor, too.
    """
    if scale is not None and type(scale) is not float:
        scale = check_scale(scale, 1)
    try:
        return (
            scale,
            None if terms.sink_logits is None else terms.sink_logits.data_ptr(),
            terms.softcap,
            query.shape,
            key.shape,
            value.shape,
            query.dtype,
            key.dtype,
            value.dtype,
            query.device,
            key.device,
            value.device,
            query.layout,
            key.layout,
            value.layout,
        )
    except AttributeError:
        return ()  # an argument is no tensor; check_tokens will raise


def check_config(config: object) -> RocketKVConfig:
    """Return `config`; raise a ConfigError if it is not a `RocketKVConfig`."""
    if not isinstance(config, RocketKVConfig):
        raise ConfigError(f"{config!r} is no RocketKVConfig; give RocketKVConfig(token_budget=...).")
    return config


def check_tokens(query: Tensor, key: Tensor, value: Tensor, held: WorkingSet | None) -> None:
    """Raise an error if new tokens do not fit together or do not fit those in `held`; see `LayerCache.prefill`."""
    _check_tensors(query=query, key=key, value=value)
    shapes = _shapes(query=query, key=key, value=value)
    if query.dim() != 4 or key.dim() != 4 or query.shape[0::2] != key.shape[0::2] or query.shape[3] != key.shape[3]:
        raise InputError(f"{shapes} do not fit; give query [B, Hq, T, D], and key and value [B, Hkv, T, D].")
    if key.shape != value.shape:
        raise InputError(f"{shapes}: key and value differ; give both in one shape, as other value widths do not work.")
    if 0 in query.shape or 0 in key.shape or query.shape[1] % key.shape[1]:
        raise InputError(f"{shapes} do not fit; give Hq as a multiple of Hkv, and no dimension of size 0.")
    _check_numbers(query=query, key=key, value=value)
    if held is None:
        return
    like = held.like
    if key.dtype != like.dtype:
        raise InputError(
            f"key is {key.dtype}, but the cache holds {like.dtype}; continue in that dtype or call reset()."
        )
    if key.device != like.device:
        raise InputError(f"key is on {key.device}, but the cache is on {like.device}; continue there or call reset().")
    if key.shape[:2] != like.shape[:2]:
        raise InputError(
            f"{shapes}: the cache holds batch {like.shape[0]} and {like.shape[1]} KV heads; "
            "continue with the same batch or call reset()."
        )
    if key.shape[3] != like.shape[3]:
        raise InputError(
            f"{shapes}: the cache holds keys with head_dim {like.shape[3]}; continue with those or call reset()."
        )


def check_scale(scale: object, head_dim: int) -> float:
    """Return the factor on the dot products, 1 / sqrt(head_dim) for None; refuse all but positive float32 numbers."""
    if scale is None:
        return float(head_dim**-0.5)
    if not _is_positive(scale):
        raise InputError(f"scale={scale!r} is no positive, finite number; give one, or None for 1 / sqrt(head_dim).")
    return float(scale)


def check_terms(scale: object, terms: object, query: Tensor) -> tuple[float, LogitTerms]:
    """Return the factor as `check_scale` does, and the terms, with the sinks as `[Hq]` float32.

    An InputError is raised for terms that do not fit the query, `[B, Hq, T, D]`.
    """
    factor = check_scale(scale, query.shape[3])
    if not isinstance(terms, LogitTerms):
        raise InputError(f"terms={terms!r} is no LogitTerms; give LogitTerms(sink_logits, softcap), or leave it out.")
    sinks, softcap, ahead = terms
    if softcap is not None and not _is_positive(softcap):
        raise InputError(f"softcap={softcap!r} is no positive, finite number; give one, or None for no soft cap.")
    softcap = None if softcap is None else float(softcap)
    if ahead is not None:
        _check_ahead(ahead, query)
    if sinks is None:
        return factor, LogitTerms(None, softcap, ahead)
    if not isinstance(sinks, Tensor) or sinks.shape != query.shape[1:2] or not sinks.is_floating_point():
        shown = f"{sinks.dtype} {list(sinks.shape)}" if isinstance(sinks, Tensor) else repr(sinks)
        raise InputError(f"sink_logits={shown} do not fit {query.shape[1]} query heads; give [Hq] floats.")
    if sinks.device != query.device:
        raise InputError(f"sink_logits are on {sinks.device}, but the query is on {query.device}; bring them there.")
    return factor, LogitTerms(sinks.detach().float().contiguous(), softcap, ahead)


def check_padding(padding: object, key: Tensor) -> Tensor | None:
    """Return the padded columns of each row of `key`, `[B]` int64 on the host, or None if no column is padded."""
    if padding is None:
        return None
    batch, width = key.shape[0], key.shape[2]
    try:
        given = torch.as_tensor(padding)
        counts = given.tolist() if given.dtype in _INTEGERS else None
    except (TypeError, ValueError, RuntimeError):  # no tensor can be made of it, or the tensor has no numbers
        counts = None
    if counts is None or given.shape != (batch,) or not all(0 <= count < width for count in counts):
        raise InputError(
            f"padding={padding if counts is None else counts} does not fit; give one number per row, "
            f"{batch} in all, from 0 to {width - 1}."
        )
    return torch.tensor(counts, dtype=torch.int64, device="cpu") if any(counts) else None


def check_rows(rows: object, batch: int) -> list[int]:
    """Return `rows` as a list; raise an InputError if they are no row numbers of a batch of `batch` rows."""
    if (
        not isinstance(rows, Tensor)
        or rows.dtype not in (torch.int64, torch.int32)
        or rows.layout != torch.strided
        or rows.device.type == "meta"
        or rows.dim() != 1
        or rows.shape[0] == 0
    ):
        raise InputError(f"rows={_describe(rows)} are no row numbers; give a tensor like torch.tensor([0]).")
    chosen = [int(row) for row in rows.tolist()]
    if not all(0 <= row < batch for row in chosen):
        raise InputError(f"rows={chosen} are not all in the batch; give numbers from 0 to {batch - 1}.")
    return chosen


def check_loaded(
    keys: Tensor, values: Tensor, num_seen: object, positions: object, *, is_complete: bool
) -> tuple[int, Tensor]:
    """Check the arguments of `LayerCache.load_tokens`.

    Return `num_seen`, and the positions as `[B, Hkv, N]` int32 on the device of the keys. With `is_complete` the N
    tokens must be all that were seen.
    """
    _check_tensors(keys=keys, values=values)
    shapes = _shapes(keys=keys, values=values)
    if keys.dim() != 4 or keys.shape != values.shape or 0 in keys.shape:
        raise InputError(f"{shapes} cannot be loaded; give both as [B, Hkv, N, D], and no dimension of size 0.")
    _check_numbers(keys=keys, values=values)
    num_tokens = keys.shape[2]
    if not isinstance(num_seen, Integral) or isinstance(num_seen, bool):
        raise InputError(f"num_seen={num_seen!r} is no whole number; give {num_tokens} or more.")
    seen = int(num_seen)
    if not num_tokens <= seen <= MOST_SEEN:
        raise InputError(
            f"num_seen={seen} does not fit {num_tokens} tokens; give a number from {num_tokens} to {MOST_SEEN}."
        )
    if is_complete and seen > num_tokens:
        raise InputError(
            f"a multi_turn cache keeps every token, so {num_tokens} of {seen} seen tokens cannot be loaded; "
            "give all seen tokens, or set mode='single_turn'."
        )
    shape = keys.shape[:3]
    if positions is None:
        return seen, torch.arange(num_tokens, dtype=torch.int32, device=keys.device).expand(shape)
    if (
        not isinstance(positions, Tensor)
        or positions.dtype not in (torch.int64, torch.int32)
        or positions.layout != torch.strided
        or positions.device.type == "meta"
        or positions.shape not in (shape, shape[2:])
    ):
        raise InputError(
            f"positions={_describe(positions)} do not fit; give int64 [{num_tokens}] or {list(shape)}, or None."
        )
    ascends = bool((positions.diff(dim=-1) > 0).all())
    if not ascends or int(positions.min()) < 0 or int(positions.max()) >= seen:
        raise InputError(f"positions do not ascend within 0 to {seen - 1}; give ascending ones below num_seen={seen}.")
    return seen, positions.to(keys.device, torch.int32).expand(shape)


def check_kept(mask: object, policy: EvictionPolicy, keys: Tensor, tokens: RaggedTokens, most: Tensor) -> Kept:
    """Return what an eviction's mask, `[B, Hkv, S]` bool, marks within the lengths; refuse a mask that does not fit.

    Each row may keep `most` tokens (`[B]` int64 on the host). How many tokens a policy of the user's own has marked is
    read from the device, for which the host waits.
    """
    name, shape = type(policy).__name__, list(keys.shape[:3])
    if (
        not isinstance(mask, Tensor)
        or mask.dtype != torch.bool
        or list(mask.shape) != shape
        or mask.device != keys.device
        or mask.layout != torch.strided
    ):
        raise InputError(
            f"{name}.keep returned {_describe(mask)}; return torch.bool {shape}, on {keys.device}, or None."
        )
    mask = mask & (torch.arange(keys.shape[2], device=keys.device) < tokens.lengths[..., None])
    counts = tokens.counts.minimum(most[:, None]) if keeps_what_it_may(policy) else mask.sum(2).cpu()
    if int(counts.min()) == 0:
        raise InputError(f"{name}.keep left a row without tokens; keep at least one token of each row and head.")
    return Kept(mask, counts)


def check_logits(logits: object, method: object, grouped: Tensor, num_tokens: int) -> Tensor:
    """Return a method's logits, `[B, Hkv, G, num_tokens]` float for queries `grouped` `[B, Hkv, G, D]`, if they fit."""
    shape = [*grouped.shape[:3], num_tokens]
    if (
        not isinstance(logits, Tensor)
        or not logits.is_floating_point()
        or list(logits.shape) != shape
        or logits.device != grouped.device
    ):
        raise InputError(
            f"{type(method).__name__}.logits returned {_describe(logits)}; return torch.float32 {shape} "
            f"on {grouped.device} or None."
        )
    return logits


def _check_ahead(ahead: object, query: Tensor) -> None:
    """Refuse what is no `LogitTerms.ahead` for a query `[B, Hq, T, D]`."""
    shape = [query.shape[0], query.shape[2]]
    if not isinstance(ahead, Tensor) or list(ahead.shape) != shape or ahead.dtype != torch.int64:
        raise InputError(f"ahead={_describe(ahead)} does not fit the queries; give torch.int64 {shape}, or None.")
    left = shape[1] - 1 - torch.arange(shape[1], device=query.device)
    if ahead.device != query.device or bool(((ahead < 0) | (ahead > left)).any()):
        raise InputError("ahead counts tokens that are not there; give 0 to T - 1 - t for query t of T, on its device.")


def _check_tensors(**tensors: Any) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise InputError(f"{name} is a {type(x).__name__}; give a torch.Tensor.")


def _check_numbers(**tensors: Tensor) -> None:
    """Refuse tensors that differ in dtype or device, or whose dtype, device or layout a cache cannot store."""
    dtypes, devices = ({getattr(x, kind) for x in tensors.values()} for kind in ("dtype", "device"))
    dtype, device = next(iter(dtypes)), next(iter(devices))
    if len(dtypes) > 1 or dtype not in DTYPES:
        described = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise InputError(f"{described} differ or are not supported; give one dtype for all, of {known}.")
    if len(devices) > 1 or device.type == "meta":
        described = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise InputError(f"{described} do not fit; give all tensors on one device, and not on meta.")
    if any(x.layout != torch.strided for x in tensors.values()):
        raise InputError(f"{', '.join(tensors)} are not all dense; give strided tensors.")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        raise UnsupportedError("a compressed cache has no gradients; run under torch.inference_mode().")


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())


def _describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return repr(x)
    return f"{x.dtype} {list(x.shape)}" + ("" if x.device.type == "cpu" else f" on {x.device}")


def _is_positive(number: object) -> TypeGuard[Real]:
    """Return whether something is a positive, finite float32 number."""
    if not isinstance(number, Real) or isinstance(number, bool):
        return False
    return _FLOAT32.tiny <= float(number) <= _FLOAT32.max
