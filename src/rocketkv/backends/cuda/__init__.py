"""The backend for NVIDIA GPUs: kernels in CUDA C++, compiled for the device when they are first used.

- In a decode step `step.py` starts the kernels in `kernels/append_and_score.cu`, `choose.cu` and `attend.cu`.
- `launch.py` says what a launch needs, `arguments.py` what the kernels are given.
- `gpu.py` compiles the kernels and starts them.

NVRTC compiles the kernels through cuda-core, without nvcc; torch for CUDA brings NVRTC along. Neither need be
installed, because this file imports them only when a function needs them.
The tests compile the same kernels for a CPU (tests/backends/cuda/emulator.py).
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from rocketkv.backends.base import LayerTensors, Scoring, Spec, decline_numbers

if TYPE_CHECKING:
    from rocketkv.backends.cuda.step import CudaStep

NAME = "cuda"
DEVICES: tuple[str, ...] = ("cuda",)
SCORINGS: tuple[Scoring, ...] = tuple(Scoring)
LEAST_CAPABILITY = (8, 0)  # the first with conversions to bfloat16


def decline(spec: Spec) -> str | None:
    """Return why this backend does not accept tokens of this kind; None if it accepts them, in any `kv_dtype`."""
    if spec.device != "cuda":
        return f"it runs on cuda, not on {spec.device}"
    gpu = _load()
    return gpu if isinstance(gpu, str) else decline_numbers(spec, takes_terms=True)


def bind(layer: LayerTensors) -> "CudaStep":
    """Return a decode step over the buffers of `layer`."""
    from rocketkv.backends.cuda.gpu import gpu_of
    from rocketkv.backends.cuda.step import CudaStep

    return CudaStep(layer, gpu_of(layer.keys.device))


@cache
def _load() -> ModuleType | str:
    """Import and return `gpu.py`, and cuda-core with it; or return a sentence that says why no kernel can run."""
    if torch.version.hip is not None:
        return "it runs on NVIDIA's devices, and this torch is for AMD's"
    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    least = min(capabilities, default=LEAST_CAPABILITY)
    if least < LEAST_CAPABILITY:
        return f"a device here has compute capability {least[0]}.{least[1]}; the kernels need 8.0"
    try:
        gpu = import_module("rocketkv.backends.cuda.gpu")
        gpu.check_compiler()
    except (ImportError, RuntimeError) as error:
        return f"its kernels cannot be compiled ({error}); install rocketkv[cuda]"
    return gpu
