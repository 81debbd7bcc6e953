"""Memory that outlives the call it is made in."""

import torch
from torch import Tensor

from rocketkv.ops.backends import cpp


def new_storage(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Allocate `shape` in `dtype`, or that of `like`, on its device, undefined, to be written to and read at random.

    It may be written to under `torch.inference_mode` and outside of it alike.
    """
    with torch.inference_mode(False):
        storage = like.new_empty(shape, dtype=dtype)
    cpp.use_huge_pages(storage)
    return storage
