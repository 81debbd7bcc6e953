"""The launch of kernels. This file needs no Triton."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rocketkv.backends.triton import sizes


class Launch:
    """A kernel with its grid and all arguments that stay the same from token to token.

    Attributes:
        kernel: the kernel, a function in Triton's language.
        grid: the number of programs along each axis.
        arguments: the kernel's arguments by name, without those given at each call.
        options: the options with which the kernel is compiled.
        device: the device of the tensors.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], *, device: torch.device, num_warps: int = 4
    ) -> None:
        """Take the `arguments` that the kernel has, and ignore those that only other kernels have."""
        self.kernel = kernel
        self.grid = grid
        self.arguments = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        self.options = {"num_warps": num_warps, "enable_fp_fusion": True}
        self.device = device

    def __call__(self, **token: Tensor | None) -> None:
        """Start the kernel for a token."""
        with _current(self.device):
            self.kernel[self.grid](**token, **self.arguments, **self.options)


def key_arguments(keys: Tensor) -> dict[str, Any]:
    """Return the arguments of a prefill's kernels for keys, `[B, Hkv, S, D]`, made contiguous along S and D."""
    num_kv_heads, head_dim = keys.shape[1], keys.shape[3]
    keys = keys if keys.stride()[2:] == (head_dim, 1) else keys.contiguous()
    return {
        "keys": keys,
        "batch_stride": keys.stride(0),
        "head_stride": keys.stride(1),
        "HKV": num_kv_heads,
        "D": head_dim,
        "D_PAD": sizes.padded(head_dim),
    }


def num_cores(device: torch.device) -> int:
    """Return the number of a device's multiprocessors."""
    if device.type != "cuda":
        return sizes.CORES_OF_CPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, because launches go to the current GPU, whatever the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
