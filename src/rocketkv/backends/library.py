"""The kernels in C++ (csrc/) are built into one library per instruction set; the best for this CPU is loaded here.

The libraries are optional: an installation without them, as on a machine without a compiler, computes in plain torch.
"""

import platform
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from rocketkv.backends.base import FLOATS

if TYPE_CHECKING:
    from rocketkv.backends import _kernels  # a stub, because all libraries have the same interface

    native = _kernels
else:

    class _Native:
        """The native library, loaded when an attribute is read; call `why_missing` first."""

        def __getattr__(self, name: str) -> Any:
            return getattr(library(), name)

    native = _Native()

NOT_INSTALLED = "its native library is not installed"


def instruction_set() -> str:
    """Return the name of the instruction set of the library in use, or the reason why there is none."""
    return why_missing() or library().__name__.rpartition("_kernels_")[2]


def multiplies_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 numbers without widening them first."""
    return any(name.endswith("_bf16") for name in library_names())


def thread_runtime() -> str:
    """Return the name of the OpenMP runtime whose threads the kernels use; empty if the kernels run on one thread."""
    return "" if why_missing() else native.thread_runtime()


def why_missing() -> str | None:
    """Return the reason why there is no native library for this CPU; None if there is one."""
    found = load()
    return found if isinstance(found, str) else None


def library() -> ModuleType:
    """Return the native library; call `why_missing` first."""
    found = load()
    assert not isinstance(found, str)
    return found


def library_names() -> list[str]:
    """Return the modules whose kernels this CPU can run, the fastest first; ATEN_CPU_CAPABILITY limits them, too."""
    names = ["_kernels_generic"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        capability = torch.backends.cpu.get_cpu_capability()
        names = ["_kernels_x86_64_v3"] if capability in ("AVX2", "AVX512") else []
        if capability == "AVX512":
            names.insert(0, "_kernels_x86_64_v4")
            if torch.cpu._is_avx512_bf16_supported():  # this private function is the same from torch 2.9 on
                names.insert(0, "_kernels_x86_64_v4_bf16")
    return [f"{__package__}.{name}" for name in names]


@cache
def load() -> ModuleType | str:
    """Return the library for this CPU, or the reason why there is none, of which the first call warns."""
    names = library_names()
    if not names:
        reason = f"this CPU runs {torch.backends.cpu.get_cpu_capability()} code only; the kernels need AVX2"
    else:
        try:
            return import_module(names[0])
        except ModuleNotFoundError:
            reason = NOT_INSTALLED
        except ImportError as error:
            reason = f"its native library does not load ({error})"
    warnings.warn(
        "on this CPU rocketkv computes in plain torch, which is slower, because the backend cpp has no kernels here "
        f"({reason}); `rocketkv info` says what is missing and how to get it.",
        RuntimeWarning,
        stacklevel=2,
    )
    return reason


def native_dtype(dtype: torch.dtype) -> "native.Dtype":
    """Return the library's value for a torch dtype."""
    return _native_dtypes()[dtype]


@cache
def _native_dtypes() -> "dict[torch.dtype, native.Dtype]":
    return {dtype: native.Dtype[str(dtype).removeprefix("torch.")] for dtype in FLOATS}
