"""Which channels of a query say most about its products with any key."""

import torch
from torch import Tensor


def largest_channels(query: Tensor, num_channels: Tensor) -> tuple[Tensor, Tensor]:
    """The channels in which the query heads of a KV head are largest together; of equal ones the lower.

    SparQ (arXiv:2312.04985), step 1, over a group of heads as in RocketKV, section "Hybrid Sparse Attention".

    Args:
        query: `[B, Hkv, G, D]` float32, the query heads of each KV head.
        num_channels: `[B]` int64, channels to read, 1 to D.

    Returns:
        The channels, `[B, Hkv, R]` int64, R the most that a row reads, the largest first; and the queries along them,
        `[B, Hkv, G, R]`, 0 where a row reads fewer.
    """
    sizes = query.abs().sum(2)
    channels = sizes.argsort(dim=2, descending=True, stable=True)[:, :, : int(num_channels.max())]
    read = torch.arange(channels.shape[2], device=query.device) < num_channels[:, None]  # [B, R]
    chosen = query.gather(3, channels[:, :, None].expand(-1, -1, query.shape[2], -1)) * read[:, None, None]
    return channels, chosen
