"""The low-bit keys of an index on the device; ops/lowbit.py specifies them and describes codes and ranges."""

import triton
import triton.language as tl

from rocketkv.backends.triton.common import CHANNELS, product, range_of, rounded
from rocketkv.ops import lowbit

GROUP = tl.constexpr(lowbit.GROUP)
GROUPS_PER_BLOCK = tl.constexpr(lowbit.GROUPS_PER_BLOCK)
LEVELS = tl.constexpr(lowbit.LEVELS)
HALF = tl.constexpr(lowbit.GROUP // 2)  # tokens whose codes are the low halves of bytes


@triton.jit
def group_start(head, group, num_blocks, D: tl.constexpr):
    """Return the place of channel 0 of a group of tokens, counted in groups of one channel."""
    block = group // GROUPS_PER_BLOCK
    return (head * num_blocks + block) * (D * GROUPS_PER_BLOCK) + (group - block * GROUPS_PER_BLOCK)


@triton.jit
def lowbit_range(ranges, open_keys, head, group, length, num_blocks, channel, D: tl.constexpr):
    """Return what a group adds to the spread of these channels: its steps, or, if open, the range of its keys."""
    is_channel = channel < D
    if length >= (group + 1) * GROUP:
        row = group_start(head, group, num_blocks, D) + channel * GROUPS_PER_BLOCK
        span = tl.load(ranges + row * 2 + 1, mask=is_channel, other=0.0).to(tl.float32)
    else:
        token = tl.arange(0, GROUP)
        mask = is_channel[:, None] & (token + group * GROUP < length)[None, :]
        keys = tl.load(open_keys + (head * D + channel[:, None]) * GROUP + token[None, :], mask=mask, other=0.0)
        span = range_of(keys, keys, mask)
    return span


@triton.jit
def close_group(codes, ranges, keys, channel_stride, token_stride, first, D: tl.constexpr, D_PAD: tl.constexpr):
    """Quantize a full group of keys as `quantize_groups` does and store it from `first` on; see `group_start`."""
    token = tl.arange(0, HALF)
    for start in range(0, D_PAD, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        is_channel = channel < D
        at = keys + channel[:, None] * channel_stride + token[None, :] * token_stride
        early = tl.load(at, mask=is_channel[:, None], other=0.0).to(tl.float32)
        late = tl.load(at + HALF * token_stride, mask=is_channel[:, None], other=0.0).to(tl.float32)
        is_broken = tl.sum(((early != early) | (late != late)).to(tl.int32), 1) > 0  # tl.min and tl.max skip NaN
        low = tl.where(is_broken, float("nan"), tl.minimum(tl.min(early, 1), tl.min(late, 1)))
        high = tl.maximum(tl.max(early, 1), tl.max(late, 1))
        step = rounded(tl.div_rn(high - low, tl.full([CHANNELS], LEVELS, tl.float32)), ranges.dtype.element_ty)
        packed = _codes(early, low, step) | (_codes(late, low, step) << 4)
        row = first + channel * GROUPS_PER_BLOCK
        tl.store(codes + row[:, None] * HALF + token[None, :], packed.to(tl.uint8), mask=is_channel[:, None])
        tl.store(ranges + row * 2, low.to(step.dtype), mask=is_channel)
        tl.store(ranges + row * 2 + 1, step, mask=is_channel)


@triton.jit
def _codes(keys, low, step):
    """Return the steps, 0 to LEVELS, from `low` to each key of `[CHANNELS, HALF]`; 0 where all keys are alike."""
    width = tl.broadcast_to(step.to(tl.float32)[:, None], keys.shape)
    steps = tl.div_rn(keys - low[:, None], width)
    steps = tl.where(steps == steps, tl.minimum(tl.maximum(steps, 0.0), LEVELS), 0.0)
    return ((steps + 8388608.0) - 8388608.0).to(tl.int32)  # adding 2**23 rounds: float32 has no fractions beyond


@triton.jit
def lowbit_products(q, is_read, codes, ranges, open_keys, head, first, start, is_closed, D: tl.constexpr):
    """Multiply queries with a group's keys as `lowbit_logits` does, without the scale; return `[G_PAD, GROUP]` float32.

    `q`, `[G_PAD, WIDTH]`, has the queries' channels from `start` on; those that `is_read` marks are read.
    """
    WIDTH: tl.constexpr = q.shape[1]
    channel, token = start + tl.arange(0, WIDTH), tl.arange(0, HALF)
    mask = is_read[:, None]
    q = tl.where(is_read[None, :], q, 0.0)
    if is_closed:
        dtype: tl.constexpr = tl.bfloat16 if q.dtype == tl.bfloat16 else tl.float32
        row = first + channel * GROUPS_PER_BLOCK
        packed = tl.load(codes + row[:, None] * HALF + token[None, :], mask=mask, other=0)
        low = tl.load(ranges + row * 2, mask=is_read, other=0.0).to(tl.float32)
        step = tl.load(ranges + row * 2 + 1, mask=is_read, other=0.0).to(tl.float32)
        read = q.to(tl.float32)
        weights = rounded(read * step[None, :], dtype)
        offsets = tl.sum(read * low[None, :], 1)[:, None]
        early = product(weights, (packed & 15).to(tl.float32).to(dtype)) + offsets
        late = product(weights, (packed >> 4).to(tl.float32).to(dtype)) + offsets
    else:
        at = open_keys + (head * D + channel[:, None]) * GROUP + token[None, :]
        early = product(q, tl.load(at, mask=mask, other=0.0))
        late = product(q, tl.load(at + HALF, mask=mask, other=0.0))
    return tl.permute(tl.join(early, late), (0, 2, 1)).reshape(q.shape[0], GROUP)
