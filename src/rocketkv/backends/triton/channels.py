"""The choice of the channels that a head reads, as `largest_channels` in ops/channels.py specifies it."""

import triton
import triton.language as tl

from rocketkv.backends.triton.common import CHANNELS, load_query, ordered


@triton.jit
def rank_channels(
    channel_sizes, channel_ranks, query, spread, head, G: tl.constexpr, D: tl.constexpr, G_PAD: tl.constexpr,
    D_PAD: tl.constexpr
):  # fmt: skip
    """Store the rank of each channel by size: the group's sum of |q|, times the spread if there is one.

    A rank is the number of channels before a channel: of those with a larger size, and of lower ones with the same.
    Every program of a head stores the same sizes and ranks. The kernel compares the stored sizes, because sums computed
    in another layout would differ in their last bits.
    """
    STEP: tl.constexpr = min(D_PAD, CHANNELS)
    for start in range(0, D_PAD, STEP):
        channel = start + tl.arange(0, STEP)
        size = tl.sum(tl.abs(load_query(query, head, start, G, D, G_PAD, STEP).to(tl.float32)), 0)
        if spread is not None:
            size *= tl.load(spread + head * D + channel, mask=channel < D, other=0.0)
        tl.store(channel_sizes + head * D_PAD + channel, size)
    tl.debug_barrier()
    for start in range(0, D_PAD, STEP):
        order = _channel_order(channel_sizes, head, start, D, D_PAD, STEP)
        num_before = tl.zeros([STEP], tl.int32)
        for first in range(0, D_PAD, STEP):
            others = _channel_order(channel_sizes, head, first, D, D_PAD, STEP)
            num_before += tl.sum((others[None, :] > order[:, None]).to(tl.int32), 1)
        tl.store(channel_ranks + head * D_PAD + start + tl.arange(0, STEP), num_before)
    tl.debug_barrier()


@triton.jit
def are_largest(channel_ranks, head, start, num_channels, D_PAD: tl.constexpr, WIDTH: tl.constexpr):
    """Mark the `num_channels` channels that are read among the `WIDTH` from `start` on: `[WIDTH]` bool."""
    return tl.load(channel_ranks + head * D_PAD + start + tl.arange(0, WIDTH)) < num_channels


@triton.jit
def _channel_order(channel_sizes, head, start, D: tl.constexpr, D_PAD: tl.constexpr, STEP: tl.constexpr):
    """Return numbers in the order of the stored sizes, the lower of equal channels first: no two are equal."""
    channel = start + tl.arange(0, STEP)
    order = ordered(tl.load(channel_sizes + head * D_PAD + channel)).to(tl.int64)
    return tl.where(channel < D, order * D_PAD + (D_PAD - 1 - channel), -1)
