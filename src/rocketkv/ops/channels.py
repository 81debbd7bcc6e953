"""Which channels of a query say most about its products with any key."""

import torch
from torch import Tensor


def largest_channels(query: Tensor, num_channels: Tensor, spread: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The channels in which the query heads of a KV head are largest together; of equal ones the lower.

    SparQ (arXiv:2312.04985), step 1, over a group of heads as in RocketKV, section "Hybrid Sparse Attention". With a
    spread, which is ours, the size of a channel is the heads' |q| times the spread of its keys: how far its part of the
    logits can differ between keys. It stays where keys are multiplied and queries divided by a number (docs/method.md).

    Args:
        query: `[B, Hkv, G, D]` float32, the query heads of each KV head.
        num_channels: `[B]` int64, channels to read, 1 to D.
        spread: `[B, Hkv, D]` float32, >= 0, of each channel's keys; None: all alike, as published.

    Returns:
        The channels, `[B, Hkv, R]` int64, R the most that a row reads, the largest first; and the queries along them,
        `[B, Hkv, G, R]`, 0 where a row reads fewer.

    Reads the `D` numbers of the spread, if there is one.
    """
    sizes = query.abs().sum(2)
    if spread is not None:
        sizes = sizes * spread
    channels = sizes.argsort(dim=2, descending=True, stable=True)[:, :, : int(num_channels.max())]
    read = torch.arange(channels.shape[2], device=query.device) < num_channels[:, None]  # [B, R]
    chosen = query.gather(3, channels[:, :, None].expand(-1, -1, query.shape[2], -1)) * read[:, None, None]
    return channels, chosen


def add_runs(spread: Tensor, ranges: Tensor, is_closed: Tensor) -> None:
    """Add the ranges of closed runs of keys to the spread, in place, one after the other: every backend rounds alike.

    Args:
        spread: `[B, Hkv, D]` float32.
        ranges: `[B, Hkv, runs, D]` float; of runs that are not closed: undefined.
        is_closed: `[B, Hkv, runs]` bool.
    """
    for run in range(ranges.shape[2]):
        torch.where(is_closed[:, :, run, None], spread + ranges[:, :, run].float(), spread, out=spread)
