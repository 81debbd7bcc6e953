"""Backends: whole decode steps done faster than torch does them, a file each. The first that accepts is used.

A backend of your own is one file like `cpp.py` and one entry in `BACKENDS`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from rocketkv.ops.backends import cpp, triton
from rocketkv.ops.backends.base import Backend, FusedStep, LayerTensors

# The fastest first; what none accepts is left to the reference in plain torch.
BACKENDS: tuple[Backend, ...] = (cpp, triton)

__all__ = ["BACKENDS", "Backend", "FusedStep", "LayerTensors", "fastest", "find_backend"]

Operation = TypeVar("Operation", bound=Callable[..., Any])


def fastest(operation: Operation, tokens: Tensor) -> Operation:
    """An operation of `ops` on these tokens, `[B, H, S, D]`, or what a backend of their device has under its name."""
    for backend in BACKENDS:
        own: Operation | None = getattr(backend, getattr(operation, "__name__", ""), None)
        if own is not None and tokens.device.type in backend.DEVICES and backend.decline(tokens) is None:
            return own
    return operation


def find_backend(
    name: str, tokens: Tensor, scoring: str | None, kv_dtype: str = "auto"
) -> tuple[Backend | None, list[str]]:
    """Find who decodes these tokens, `[B, H, S, D]`.

    Args:
        name: of a backend; `auto`: any; `reference`: none.
        tokens: of the dtype, device and head_dim in question.
        scoring: of the selection method; None: its own business.
        kv_dtype: how keys and values are stored, as in `RocketKVConfig`.

    Returns:
        The backend, None for the reference; and why each one asked before it declined.
    """
    reasons: list[str] = []
    for backend in BACKENDS:
        if name == backend.NAME or (name == "auto" and tokens.device.type in backend.DEVICES):
            reason = backend.decline(tokens, kv_dtype)
            if reason is None and scoring not in backend.scorings():
                reason = f"the selection method's scoring={scoring!r} is none of {', '.join(backend.scorings())}"
            if reason is None:
                return backend, reasons
            reasons.append(f"{backend.NAME}: {reason}")
    return None, reasons
