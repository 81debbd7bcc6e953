"""Backends: whole decode steps done faster than torch does them, a file each. The first that accepts is used.

A backend of your own is one file like `cpp.py` and one entry in `BACKENDS`.
"""

from torch import Tensor

from rocketkv.ops.backends import cpp, triton
from rocketkv.ops.backends.base import Backend, FusedStep, LayerTensors

# The fastest first; what none accepts is left to the reference in plain torch.
BACKENDS: tuple[Backend, ...] = (cpp, triton)

__all__ = ["BACKENDS", "Backend", "FusedStep", "LayerTensors", "find_backend"]


def find_backend(name: str, tokens: Tensor, scoring: str | None) -> tuple[Backend | None, list[str]]:
    """Find who decodes these tokens, `[B, H, S, D]`.

    Args:
        name: of a backend; `auto`: any; `reference`: none.
        tokens: of the dtype, device and head_dim in question.
        scoring: of the selection method; None: its own business.

    Returns:
        The backend, None for the reference; and why each one asked before it declined.
    """
    reasons: list[str] = []
    for backend in BACKENDS:
        if name == backend.NAME or (name == "auto" and tokens.device.type in backend.DEVICES):
            reason = backend.decline(tokens)
            if reason is None and scoring not in backend.scorings():
                reason = f"the selection method's scoring={scoring!r} is none of {', '.join(backend.scorings())}"
            if reason is None:
                return backend, reasons
            reasons.append(f"{backend.NAME}: {reason}")
    return None, reasons
