"""What `LayerCache` refuses: tensors and numbers that do not fit, before anything changes, and a second thread."""

from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real
from threading import get_ident
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from rocketkv.cache import WorkingSet
from rocketkv.config import RocketKVConfig
from rocketkv.errors import ConfigError, InputError, UnsupportedError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_SEEN = 1 << 30  # tokens: positions are stored in 32 bits, and a row goes on
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOAT32 = torch.finfo(torch.float32)


class OneAtATime(Protocol):
    """An object whose `exclusive` methods one thread runs at a time.

    Attributes:
        user: empty, or the thread that runs such a method.
    """

    user: dict[str, int]


Self = TypeVar("Self", bound=OneAtATime)
Args = ParamSpec("Args")
Result = TypeVar("Result")


def exclusive(method: Callable[Concatenate[Self, Args], Result]) -> Callable[Concatenate[Self, Args], Result]:
    """Let `method` raise an InputError where another thread is inside an exclusive method of the same object.

    A call that an interrupt ends without this noticing leaves the object to its thread, whose next call frees it.
    """

    @wraps(method)
    def alone(self: Self, /, *args: Args.args, **kwargs: Args.kwargs) -> Result:
        thread = get_ident()
        if self.user.setdefault("thread", thread) != thread:  # one step for the interpreter: a lock that costs little
            raise InputError(
                f"{method.__name__}: another thread is using this cache; use a cache in one thread at a time, "
                "or give each thread its copy()."
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            self.user.clear()

    return alone


def kind_of(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[object, ...]:
    """All that `check_tokens` and `check_scale` look at but for gradients: what passed once passes again."""
    if scale is not None and type(scale) is not float:
        scale = check_scale(scale, 1)
    try:
        return (
            scale,
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
        return ()  # these are no tensors: check_tokens will say so


def check_config(config: object) -> RocketKVConfig:
    """Refuse what is no configuration."""
    if not isinstance(config, RocketKVConfig):
        raise ConfigError(f"{config!r} is no RocketKVConfig; give RocketKVConfig(token_budget=...).")
    return config


def check_tokens(query: Tensor, key: Tensor, value: Tensor, held: WorkingSet | None) -> None:
    """Refuse new tokens that do not fit together or with those that are `held`; see `LayerCache.prefill`."""
    _check_tensors(query=query, key=key, value=value)
    shapes = _shapes(query=query, key=key, value=value)
    if query.dim() != 4 or key.dim() != 4 or query.shape[0::2] != key.shape[0::2] or query.shape[3] != key.shape[3]:
        raise InputError(f"{shapes} do not fit; give [B, Hq, T, D] and twice [B, Hkv, T, D].")
    if key.shape != value.shape:
        raise InputError(f"{shapes}: key and value differ; attention with other value widths is not supported.")
    if 0 in query.shape or 0 in key.shape or query.shape[1] % key.shape[1]:
        raise InputError(f"{shapes}: Hq must be a multiple of Hkv and nothing may be empty.")
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
    """The factor on the dot products, 1 / sqrt(head_dim) if None; refuse what is no positive number of float32."""
    if scale is None:
        return float(head_dim**-0.5)
    if not isinstance(scale, Real) or isinstance(scale, bool) or not _FLOAT32.tiny <= float(scale) <= _FLOAT32.max:
        raise InputError(f"scale={scale!r} is no positive, finite number; give one, or None for 1 / sqrt(head_dim).")
    return float(scale)


def check_padding(padding: object, key: Tensor) -> Tensor | None:
    """Padded columns of each row of `key` as `[B]` int64 on its device, None if there are none; refuse others."""
    if padding is None:
        return None
    batch, width = key.shape[0], key.shape[2]
    try:
        given = torch.as_tensor(padding)
        counts = given.tolist() if given.dtype in _INTEGERS else None
    except (TypeError, ValueError, RuntimeError):  # what tensors are not made of, or one without numbers
        counts = None
    if counts is None or given.shape != (batch,) or not all(0 <= count < width for count in counts):
        raise InputError(
            f"padding={padding if counts is None else counts} does not fit; give one number per row, "
            f"{batch} in all, from 0 to {width - 1}."
        )
    return given.to(key.device, torch.int64) if any(counts) else None


def check_rows(rows: object, batch: int) -> list[int]:
    """Numbers of rows of a batch; refuse others."""
    if (
        not isinstance(rows, Tensor)
        or rows.dtype not in (torch.int64, torch.int32)
        or rows.layout != torch.strided
        or rows.device.type == "meta"
        or rows.dim() != 1
        or rows.shape[0] == 0
    ):
        raise InputError(f"rows={_describe(rows)} are no numbers of rows; give a tensor like torch.tensor([0]).")
    chosen = [int(row) for row in rows.tolist()]
    if not all(0 <= row < batch for row in chosen):
        raise InputError(f"rows={chosen} are not all in the batch; give numbers from 0 to {batch - 1}.")
    return chosen


def check_loaded(
    keys: Tensor, values: Tensor, num_seen: object, positions: object, *, is_complete: bool
) -> tuple[int, Tensor]:
    """What `LayerCache.load_tokens` is given: num_seen, and positions as `[B, Hkv, N]` int32 on the device of the keys.

    With `is_complete` no token may be left out.
    """
    _check_tensors(keys=keys, values=values)
    shapes = _shapes(keys=keys, values=values)
    if keys.dim() != 4 or keys.shape != values.shape or 0 in keys.shape:
        raise InputError(f"{shapes} cannot be loaded; give twice [B, Hkv, N, D], nothing empty.")
    _check_numbers(keys=keys, values=values)
    num_tokens = keys.shape[2]
    if not isinstance(num_seen, Integral) or isinstance(num_seen, bool):
        raise InputError(f"num_seen={num_seen!r} is no whole number; give {num_tokens} or more.")
    seen = int(num_seen)
    if not num_tokens <= seen <= MOST_SEEN:
        raise InputError(
            f"{num_tokens} tokens of {seen} seen cannot be loaded; give at most num_seen, {MOST_SEEN} at most."
        )
    if is_complete and seen > num_tokens:
        raise InputError(
            f"a multi_turn cache keeps every token, so {num_tokens} of {seen} seen cannot be loaded; "
            "give all of them, or set mode='single_turn'."
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
        raise InputError(f"positions do not ascend from 0 or more to less than num_seen={seen}; give those that do.")
    return seen, positions.to(keys.device, torch.int32).expand(shape)


def check_kept(mask: object, policy: object, keys: Tensor, lengths: Tensor) -> Tensor:
    """The mask of tokens that stay, `[B, Hkv, S]` bool, False beyond the lengths; refuse what a policy must not say."""
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
    mask = mask & (torch.arange(keys.shape[2], device=keys.device) < lengths[..., None])
    if not bool(mask.any(2).all()):
        raise InputError(f"{name}.keep left a row without tokens; keep one at least.")
    return mask


def check_logits(logits: object, method: object, grouped: Tensor, num_tokens: int) -> Tensor:
    """The logits of a method of somebody's own, `[B, Hkv, G, num_tokens]` float; `grouped`: `[B, Hkv, G, D]`."""
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


def _check_tensors(**tensors: Any) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise InputError(f"{name} is a {type(x).__name__}; give a torch.Tensor.")


def _check_numbers(**tensors: Tensor) -> None:
    """Refuse tensors that differ in dtype or device, or are of a kind that a cache cannot hold."""
    dtypes, devices = ({getattr(x, kind) for x in tensors.values()} for kind in ("dtype", "device"))
    dtype, device = next(iter(dtypes)), next(iter(devices))
    if len(dtypes) > 1 or dtype not in DTYPES:
        described = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise InputError(f"{described} differ or are not taken; give one floating-point dtype, of {known}.")
    if len(devices) > 1 or device.type == "meta":
        described = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise InputError(f"{described}: give tensors on one device, which has numbers.")
    if any(x.layout != torch.strided for x in tensors.values()):
        raise InputError(f"{', '.join(tensors)} are not all strided; give dense tensors.")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        raise UnsupportedError("a compressed cache has no gradients; run under torch.inference_mode().")


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())


def _describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return repr(x)
    return f"{x.dtype} {list(x.shape)}" + ("" if x.device.type == "cpu" else f" on {x.device}")
