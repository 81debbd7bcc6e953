"""The gathering of tokens, row by row."""

from torch import Tensor


def take_tokens(tokens: Tensor, slots: Tensor) -> Tensor:
    """Gather tokens of each row and head.

    Args:
        tokens: `[B, H, S, D]` or `[B, H, S]`.
        slots: `[B, H, K]` int64, 0 to S - 1.

    Returns:
        `[B, H, K, D]` or `[B, H, K]`.

    Reads `B * H * K * D` elements.
    """
    if tokens.dim() == 3:
        return tokens.gather(2, slots)
    return tokens.gather(2, slots[..., None].expand(*slots.shape, tokens.shape[3]))
