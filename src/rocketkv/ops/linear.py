"""Products of a few rows with a weight matrix: all that a decode step is besides attention."""

from torch import Tensor
from torch.nn import functional

from rocketkv.ops.backends import cpp

MAX_ROWS = 8  # with more, reading the weights no longer dominates and torch's own product is better


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows with the transpose of a weight matrix.

    Args:
        x: `[..., I]` float.
        weight: `[O, I]` in the dtype of `x`.

    Returns:
        `[..., O]` in the dtype of `x`, accumulated in float32.

    Reads `O * I` elements of weights, whatever the number of rows up to `MAX_ROWS`.
    """
    if x.numel() <= MAX_ROWS * x.shape[-1] and cpp.takes_linear(x, weight):
        return cpp.linear(x, weight)
    return functional.linear(x, weight)
