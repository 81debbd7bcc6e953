"""The choice of the channels of a query that matter most for its dot products with the keys."""

import torch
from torch import Tensor


def largest_channels(query: Tensor, num_channels: Tensor, spread: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose the channels in which the query heads of a KV head are largest together; of equal ones the lower.

    Source: SparQ (arXiv:2312.04985), step 1, over a group of heads as in RocketKV, section "Hybrid Sparse Attention".
    The spread is our addition. With it the size of a channel is the sum of the heads' |q| times the spread of the
    channel's keys, which tells how far the channel's part of the logits can differ between keys. This size does not
    change if a channel's keys are multiplied and its queries divided by the same number (docs/method.md).

    Args:
        query: `[B, Hkv, G, D]` float32, the query heads of each KV head.
        num_channels: `[B]` int64, the number of channels to read, 1 to D.
        spread: `[B, Hkv, D]` float32, >= 0, the spread of each channel's keys; None takes |q| alone, as published.

    Returns:
        The channels, `[B, Hkv, R]` int64, the largest first, where R is the largest of `num_channels`; and the queries
        along these channels, `[B, Hkv, G, R]` float32, which are 0 where a row reads fewer channels.

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
    """Add the ranges of closed runs of keys to the spread, in place, in order, so that all backends round alike.

    Args:
        spread: `[B, Hkv, D]` float32.
        ranges: `[B, Hkv, runs, D]` float, the range of the keys of each run; undefined for runs that are not closed.
        is_closed: `[B, Hkv, runs]` bool.
    """
    for run in range(ranges.shape[2]):
        torch.where(is_closed[:, :, run, None], spread + ranges[:, :, run].float(), spread, out=spread)
