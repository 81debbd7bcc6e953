"""The kernels that build an index after a prefill, as `build_lowbit` and `build_pages` in ops specify it.

Keys are `[B, Hkv, S, D]`, in which rows and heads may have any stride.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rocketkv.backends.triton.common import CHANNELS
from rocketkv.backends.triton.launch import Launch, key_arguments
from rocketkv.backends.triton.lowbit import GROUP, close_group, group_start, lowbit_range
from rocketkv.backends.triton.pages import PAGES_PER_BLOCK, page_range
from rocketkv.ops import LowBitKeys, PageBounds


@triton.jit(do_not_specialize=["num_blocks", "batch_stride", "head_stride"])
def build_lowbit_kernel(
    keys,
    lengths,
    codes,
    ranges,
    open_keys,
    num_blocks,
    batch_stride,
    head_stride,
    HKV: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Quantize a head's group, or copy it if it is open; see `build_lowbit` in ops/lowbit.py. Grid: heads, groups."""
    head, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + head)
    keys += head // HKV * batch_stride + head % HKV * head_stride + group.to(tl.int64) * GROUP * D
    if (group + 1) * GROUP <= length:
        close_group(codes, ranges, keys, 1, D, group_start(head, group, num_blocks, D), D, D_PAD)
    elif group * GROUP < length:
        token = tl.arange(0, GROUP)
        for start in range(0, D_PAD, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            mask = (channel < D)[:, None] & (group * GROUP + token < length)[None, :]
            open_key = tl.load(keys + token[None, :] * D + channel[:, None], mask=mask)
            tl.store(open_keys + (head * D + channel[:, None]) * GROUP + token[None, :], open_key, mask=mask)


@triton.jit(do_not_specialize=["num_blocks"])
def sum_lowbit_spread_kernel(lengths, ranges, open_keys, spread, num_blocks, D: tl.constexpr):
    """Sum up the spread of `CHANNELS` channels, group after group; see `build_lowbit` in ops/lowbit.py.

    Grid: heads, blocks of channels.
    """
    head, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    length = tl.load(lengths + head).to(tl.int32)
    total = lowbit_range(ranges, open_keys, head, 0, length, num_blocks, channel, D)
    for group in range(1, length // GROUP):
        total += lowbit_range(ranges, open_keys, head, group, length, num_blocks, channel, D)
    tl.store(spread + head * D + channel, total, mask=channel < D)


def build_lowbit(index: LowBitKeys, keys: Tensor, lengths: Tensor) -> None:
    """Build the index in two launches; see `build_lowbit` in ops/lowbit.py."""
    num_groups = -(-keys.shape[2] // GROUP.value)
    arguments = index._asdict() | {"num_blocks": index.codes.shape[2]}
    _build(build_lowbit_kernel, num_groups, sum_lowbit_spread_kernel, keys, lengths, arguments)


@triton.jit(do_not_specialize=["num_blocks", "batch_stride", "head_stride"])
def build_pages_kernel(
    bounds,
    keys,
    lengths,
    page_size,
    num_blocks,
    batch_stride,
    head_stride,
    HKV: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Store the bounds of a head's block of pages; see `build_pages` in ops/pages.py. Grid: heads, blocks."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length, size = tl.load(lengths + head), tl.load(page_size + head // HKV)
    page = block * PAGES_PER_BLOCK + tl.arange(0, PAGES_PER_BLOCK)
    if block * PAGES_PER_BLOCK * size >= length:
        return
    keys += head // HKV * batch_stride + head % HKV * head_stride
    for start in range(0, D_PAD, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        is_channel = (channel < D)[:, None]
        low = tl.full([CHANNELS, PAGES_PER_BLOCK], float("inf"), tl.float32)
        high = tl.full([CHANNELS, PAGES_PER_BLOCK], -float("inf"), tl.float32)
        for i in range(size):
            token = page * size + i
            mask = is_channel & (token < length)[None, :]
            key = tl.load(keys + token[None, :] * D + channel[:, None], mask=mask, other=0.0).to(tl.float32)
            low = tl.where(mask & ((key < low) | (key != key)), key, low)  # a NaN stays
            high = tl.where(mask & ((key > high) | (key != key)), key, high)
        at = bounds + ((head * num_blocks + block) * NUM_ROWS + channel[:, None]) * PAGES_PER_BLOCK
        at += tl.arange(0, PAGES_PER_BLOCK)[None, :]
        if NUM_ROWS > D:
            tl.store(at, low, mask=is_channel)
        tl.store(at + (NUM_ROWS - D) * PAGES_PER_BLOCK, high, mask=is_channel)


@triton.jit(do_not_specialize=["num_blocks"])
def sum_page_spread_kernel(
    lengths,
    page_size,
    bounds,
    spread,
    num_blocks,
    HKV: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Sum up the spread of `CHANNELS` channels, block after block; see `build_pages` in ops/pages.py.

    Grid: heads, blocks of channels.
    """
    head, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    length, size = tl.load(lengths + head).to(tl.int32), tl.load(page_size + head // HKV).to(tl.int32)
    total = page_range(bounds, head, 0, length, size, num_blocks, channel, NUM_ROWS, D)
    for block in range(1, length // (PAGES_PER_BLOCK * size)):
        total += page_range(bounds, head, block, length, size, num_blocks, channel, NUM_ROWS, D)
    tl.store(spread + head * D + channel, total, mask=channel < D)


def build_pages(index: PageBounds, keys: Tensor, lengths: Tensor) -> None:
    """Build the index in one launch, and its spread, if there is one, in another; see `build_pages` in ops/pages.py."""
    num_blocks, num_rows = index.bounds.shape[2:4]
    arguments = index._asdict() | {"num_blocks": num_blocks, "NUM_ROWS": num_rows}
    arguments["page_size"] = index.page_size.contiguous()
    _build(build_pages_kernel, num_blocks, sum_page_spread_kernel, keys, lengths, arguments)


def _build(
    build: Any, num_runs: int, sum_spread: Any, keys: Tensor, lengths: Tensor, arguments: dict[str, Any]
) -> None:
    """Start one kernel over all runs of tokens (groups or blocks of pages), and the other to sum up their spread."""
    arguments |= key_arguments(keys) | {"lengths": lengths.contiguous()}
    num_heads = lengths.numel()
    Launch(build, (num_heads, num_runs), arguments, device=keys.device)()
    if arguments["spread"] is not None:
        grid = (num_heads, -(-keys.shape[3] // CHANNELS.value))
        Launch(sum_spread, grid, arguments, device=keys.device)()
