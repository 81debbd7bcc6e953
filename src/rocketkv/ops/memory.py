"""The allocation of tensors that outlive the call in which they are made, and the way of numbers to a device."""

import torch
from torch import Tensor


def new_storage(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return an undefined tensor of `shape` on the device of `like`, in `dtype` or, with None, in the dtype of `like`.

    The tensor may be written to with `torch.inference_mode` on or off.
    """
    with torch.inference_mode(False):
        return like.new_empty(shape, dtype=dtype)


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a tensor on the host, on a device; the host does not wait until the device has worked off more.

    From memory that is not pinned, CUDA may copy only after all earlier work of the stream.
    """
    x = x.contiguous().pin_memory() if device.type == "cuda" else x.contiguous()
    return x.to(device, non_blocking=True, copy=True)
