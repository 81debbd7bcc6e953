"""Backends do faster what `ops` specifies in plain torch; each backend is one file or folder.

`find_backend` finds the first backend that accepts a layer's decode steps. The other functions do single operations of
`ops`, by the first backend that has the operation and accepts the tensors, or else in plain torch. A backend of your
own is one file like `cpp.py` and one entry in `BACKENDS`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rocketkv import ops
from rocketkv.backends import cpp, cuda, triton
from rocketkv.backends.base import Backend, LayerTensors, ReadingStep, Scoring, Spec, Step
from rocketkv.ops import NO_TERMS, LogitTerms, LowBitKeys, PageBounds

# The fastest backend comes first; the reference in plain torch runs what no backend accepts.
BACKENDS: tuple[Backend, ...] = (cpp, cuda, triton)
MAX_LINEAR_ROWS = 8  # with more rows, reading the weights no longer dominates and torch's own product is faster

__all__ = [
    "BACKENDS",
    "Backend",
    "LayerTensors",
    "ReadingStep",
    "Scoring",
    "Spec",
    "Step",
    "build_lowbit",
    "build_pages",
    "fastest",
    "find_backend",
    "linear",
    "new_storage",
    "prefill_densely",
    "score_window",
]


def find_backend(name: str, spec: Spec, scoring: Scoring | None) -> tuple[Backend | None, list[str]]:
    """Find the backend that decodes tokens of this kind.

    Args:
        name: the name of a backend; `auto` allows any backend and `reference` none.
        spec: the kind of the tokens.
        scoring: the scoring of the selection method; None for a scoring that no backend knows.

    Returns:
        The backend, or None for the reference; and the reasons of the backends that declined before it.
    """
    reasons: list[str] = []
    for backend in BACKENDS:
        if name == backend.NAME or (name == "auto" and spec.device in backend.DEVICES):
            reason = backend.decline(spec)
            if reason is None and scoring not in backend.SCORINGS:
                own = None if scoring is None else str(scoring)
                reason = f"the selection method's scoring={own!r} is none of {', '.join(backend.SCORINGS)}"
            if reason is None:
                return backend, reasons
            reasons.append(f"{backend.NAME}: {reason}")
    return None, reasons


def prefill_densely(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lengths: Tensor | None = None,
    num_queries: Tensor | None = None,
    scale: float,
    terms: LogitTerms = NO_TERMS,
) -> Tensor:
    """See `ops.prefill_densely`."""
    attend = fastest("prefill_densely", keys, terms)
    output: Tensor = attend(query, keys, values, lengths=lengths, num_queries=num_queries, scale=scale, terms=terms)
    return output


def score_window(
    query: Tensor,
    keys: Tensor,
    *,
    lengths: Tensor,
    num_queries: Tensor,
    scale: float,
    terms: LogitTerms = NO_TERMS,
    by_peak: bool = False,
) -> Tensor:
    """See `ops.score_window`."""
    score = fastest("score_window", keys, terms)
    scores: Tensor = score(
        query, keys, lengths=lengths, num_queries=num_queries, scale=scale, terms=terms, by_peak=by_peak
    )
    return scores


def build_pages(index: PageBounds, keys: Tensor, lengths: Tensor) -> None:
    """See `ops.build_pages`."""
    fastest("build_pages", keys)(index, keys, lengths)


def build_lowbit(index: LowBitKeys, keys: Tensor, lengths: Tensor) -> None:
    """See `ops.build_lowbit`."""
    fastest("build_lowbit", keys)(index, keys, lengths)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows with the transpose of a weight matrix, as a model's linear layers do in a decode step.

    Args:
        x: `[..., I]` float.
        weight: `[O, I]` in the dtype of `x`.

    Returns:
        `[..., O]` in the dtype of `x`, accumulated in float32.

    Reads `O * I` elements of weights, whatever the number of rows up to `MAX_LINEAR_ROWS`.
    """
    if x.numel() <= MAX_LINEAR_ROWS * x.shape[-1] and cpp.takes_linear(x, weight):
        return cpp.linear(x, weight)
    return functional.linear(x, weight)


def new_storage(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """See `ops.new_storage`; on a CPU the memory is requested in huge pages, which makes reading at random faster."""
    storage = ops.new_storage(like, shape, dtype)
    cpp.use_huge_pages(storage)
    return storage


def fastest(operation: str, tokens: Tensor, terms: LogitTerms = NO_TERMS) -> Callable[..., Any]:
    """The operation of this name of the first backend that has it and takes the tokens, `[B, H, S, D]`, or of `ops`.

    A backend may have a `decline_` of its own for an operation.
    """
    spec = Spec.of(tokens, terms=terms)
    for backend in BACKENDS:
        own: Callable[..., Any] | None = getattr(backend, operation, None)
        decline = getattr(backend, f"decline_{operation}", backend.decline)
        if own is not None and spec.device in backend.DEVICES and decline(spec) is None:
            return own
    found: Callable[..., Any] = getattr(ops, operation)
    return found
