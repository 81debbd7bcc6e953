"""The allocation of tensors that outlive the call in which they are made."""

import torch
from torch import Tensor


def new_storage(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return an undefined tensor of `shape` on the device of `like`, in `dtype` or, with None, in the dtype of `like`.

    The tensor may be written to with `torch.inference_mode` on or off.
    """
    with torch.inference_mode(False):
        return like.new_empty(shape, dtype=dtype)
