"""The GPU backend: kernels in Triton, compiled for the device when they are first used.

- In a decode step `step.py` starts the kernels in `append_score.py`, `choose.py` and `attend.py`.
- After a prefill `window.py` computes stage 1's scores, and `build.py` builds an index.
- All kernels share `common.py`; `channels.py`, `int8.py`, `lowbit.py` and `pages.py` each have one idea of `ops`.

Triton need not be installed, because this file imports the kernels only when a function needs them.
With TRITON_INTERPRET=1 the kernels run on the CPU, slowly; without a GPU the tests run them in this way.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rocketkv.backends.base import LayerTensors, Scoring, Spec, decline_numbers
from rocketkv.ops import LogitTerms, LowBitKeys, PageBounds

if TYPE_CHECKING:
    from rocketkv.backends.triton.step import TritonStep

NAME = "triton"
DEVICES: tuple[str, ...] = ("cuda",)  # torch has this name for AMD's devices, too
SCORINGS: tuple[Scoring, ...] = tuple(Scoring)


def decline(spec: Spec) -> str | None:
    """Return why this backend does not accept tokens of this kind; None if it accepts them."""
    kernels = _load()
    if isinstance(kernels, str):
        return kernels
    wanted = "cpu" if kernels.INTERPRETED else "cuda"
    if spec.device != wanted:
        hint = " under TRITON_INTERPRET=1" if kernels.INTERPRETED else ""
        return f"it runs on {wanted}{hint}, not on {spec.device}"
    if reason := decline_numbers(spec, takes_terms=True):
        return reason
    if spec.kv_dtype == "int8" and spec.dtype == torch.float32:  # dequantized float32 tiles would not fit in registers
        return "it takes keys and values in 8 bits for 16-bit dtypes only"
    return None


def bind(layer: LayerTensors) -> "TritonStep":
    """Return a decode step over the buffers of `layer`."""
    from rocketkv.backends.triton.step import TritonStep

    return TritonStep(layer)


def score_window(
    query: Tensor, keys: Tensor, *, lengths: Tensor, num_queries: Tensor, scale: float, by_peak: bool, terms: LogitTerms
) -> Tensor:
    """See `ops.score_window`."""
    from rocketkv.backends.triton import window

    return window.score_window(
        query, keys, lengths=lengths, num_queries=num_queries, scale=scale, terms=terms, by_peak=by_peak
    )


def build_pages(index: PageBounds, keys: Tensor, lengths: Tensor) -> None:
    """See `ops.build_pages`."""
    from rocketkv.backends.triton import build

    build.build_pages(index, keys, lengths)


def build_lowbit(index: LowBitKeys, keys: Tensor, lengths: Tensor) -> None:
    """See `ops.build_lowbit`."""
    from rocketkv.backends.triton import build

    build.build_lowbit(index, keys, lengths)


@cache
def _load() -> ModuleType | str:
    """Import and return `common.py`, and Triton with it; or return a sentence that says why Triton does not load."""
    try:
        return import_module("rocketkv.backends.triton.common")
    except ImportError as error:
        return f"Triton does not load ({error}); install rocketkv[triton]"
