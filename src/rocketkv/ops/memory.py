"""Memory that outlives the call it is made in."""

import torch
from torch import Tensor


def new_storage(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Allocate `shape` in `dtype`, or that of `like`, on its device, undefined.

    The tensor may be written to under `torch.inference_mode` and outside of it alike.
    """
    with torch.inference_mode(False):
        return like.new_empty(shape, dtype=dtype)
