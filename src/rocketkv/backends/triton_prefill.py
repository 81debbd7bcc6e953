"""The kernels behind `triton.py` that run once per prefill: the window's scores of stage 1, and both indices.

Keys are `[B, Hkv, S, D]` with strides of their own over rows and heads. The scratch of the window: `partials`
`[B, Hkv, parts, 2, G * W]` float32, each query's largest logit in a part and the sum of exponentials relative to it.
"""

import triton
import triton.language as tl

from rocketkv.backends.triton_kernels import (
    CHANNELS,
    GROUP,
    PAGES_PER_BLOCK,
    close_group,
    group_start,
    lowbit_range,
    page_range,
    product,
)


@triton.jit(do_not_specialize=["num_blocks", "batch_stride", "head_stride"])
def build_lowbit(
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
def sum_lowbit_spread(lengths, ranges, open_keys, spread, num_blocks, D: tl.constexpr):
    """Spread of `CHANNELS` channels of a head, group after group; see `build_lowbit` in ops/lowbit.py.

    Grid: heads, blocks of channels.
    """
    head, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    length = tl.load(lengths + head).to(tl.int32)
    total = lowbit_range(ranges, open_keys, head, 0, length, num_blocks, channel, D)
    for group in range(1, length // GROUP):
        total += lowbit_range(ranges, open_keys, head, group, length, num_blocks, channel, D)
    tl.store(spread + head * D + channel, total, mask=channel < D)


@triton.jit(do_not_specialize=["num_blocks"])
def sum_page_spread(
    lengths,
    page_size,
    bounds,
    spread,
    num_blocks,
    HKV: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Spread of `CHANNELS` channels of a head, block after block; see `build_pages` in ops/pages.py.

    Grid: heads, blocks of channels.
    """
    head, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    length, size = tl.load(lengths + head).to(tl.int32), tl.load(page_size + head // HKV).to(tl.int32)
    total = page_range(bounds, head, 0, length, size, num_blocks, channel, NUM_ROWS, D)
    for block in range(1, length // (PAGES_PER_BLOCK * size)):
        total += page_range(bounds, head, block, length, size, num_blocks, channel, NUM_ROWS, D)
    tl.store(spread + head * D + channel, total, mask=channel < D)


@triton.jit(do_not_specialize=["num_blocks", "batch_stride", "head_stride"])
def build_pages(
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
    """Bounds of a head's block of pages; see `build_pages` in ops/pages.py. Grid: heads, blocks."""
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
            low = tl.where(mask & ((key < low) | (key != key)), key, low)  # what is no number stays
            high = tl.where(mask & ((key > high) | (key != key)), key, high)
        at = bounds + ((head * num_blocks + block) * NUM_ROWS + channel[:, None]) * PAGES_PER_BLOCK
        at += tl.arange(0, PAGES_PER_BLOCK)[None, :]
        if NUM_ROWS > D:
            tl.store(at, low, mask=is_channel)
        tl.store(at + (NUM_ROWS - D) * PAGES_PER_BLOCK, high, mask=is_channel)


@triton.jit
def _window_logits(
    query, keys, head, length, num_queries, first_row, start, scale, ROWS: tl.constexpr, W: tl.constexpr,
    D: tl.constexpr, R_PAD: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Logits, `[R_PAD, TILE]`, of some of the queries of a window for the tokens from `start` on; -inf if not seen."""
    row, channel, token = first_row + tl.arange(0, R_PAD), tl.arange(0, D_PAD), start + tl.arange(0, TILE)
    is_channel = channel < D
    q = tl.load(
        query + (head * ROWS + row[:, None]) * D + channel[None, :],
        mask=(row < ROWS)[:, None] & is_channel[None, :],
        other=0.0,
    )
    k = tl.load(
        keys + token[:, None].to(tl.int64) * D + channel[None, :],
        mask=(token < length)[:, None] & is_channel[None, :],
        other=0.0,
    )
    query_from_end = W - 1 - row % W
    sees = (row < ROWS) & (query_from_end < num_queries)
    is_visible = sees[:, None] & ((length - 1 - token)[None, :] >= query_from_end[:, None])
    return tl.where(is_visible, product(q, tl.trans(k)) * scale, -float("inf"))


@triton.jit(do_not_specialize=["num_parts", "part_size", "batch_stride", "head_stride"])
def sum_window(
    query, keys, lengths, num_queries, partials, scale, num_parts, part_size, batch_stride, head_stride,
    HKV: tl.constexpr, G: tl.constexpr, W: tl.constexpr, D: tl.constexpr, R_PAD: tl.constexpr, D_PAD: tl.constexpr,
    TILE: tl.constexpr
):  # fmt: skip
    """Each query's largest logit in a part of a head's tokens, and the sum of exponentials relative to it.

    Grid: heads, parts, groups of `R_PAD` queries. Reads the part's keys.
    """
    head, part, first_row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * R_PAD
    ROWS: tl.constexpr = G * W
    length, seeing = tl.load(lengths + head).to(tl.int32), tl.load(num_queries + head // HKV).to(tl.int32)
    keys += head // HKV * batch_stride + head % HKV * head_stride
    best = tl.full([R_PAD], -float("inf"), tl.float32)
    total = tl.zeros([R_PAD], tl.float32)
    begin = part * part_size
    for start in range(begin, tl.minimum(begin + part_size, length), TILE):
        logits = _window_logits(
            query, keys, head, length, seeing, first_row, start, scale, ROWS, W, D, R_PAD, D_PAD, TILE
        )
        higher = tl.maximum(best, tl.max(logits, 1))
        safe = tl.where(higher > -float("inf"), higher, 0.0)  # rows that see nothing yet
        total = total * tl.exp(best - safe) + tl.sum(tl.exp(logits - safe[:, None]), 1)
        best = higher
    row = first_row + tl.arange(0, R_PAD)
    at = partials + (head * num_parts + part) * 2 * ROWS + row
    tl.store(at, best, mask=row < ROWS)
    tl.store(at + ROWS, total, mask=row < ROWS)


@triton.jit(do_not_specialize=["num_parts", "part_size", "num_tokens", "batch_stride", "head_stride"])
def score_window(
    query, keys, lengths, num_queries, partials, scores, scale, num_parts, part_size, num_tokens, batch_stride,
    head_stride, BY_PEAK: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    R_PAD: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """What `R_PAD` queries give to the tokens of a part, together or at most; see `score_window` in ops/scores.py.

    Grid: heads, parts, groups of `R_PAD` queries. Reads the part's keys.
    """
    head, part, first_row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * R_PAD
    ROWS: tl.constexpr = G * W
    length, seeing = tl.load(lengths + head).to(tl.int32), tl.load(num_queries + head // HKV).to(tl.int32)
    keys += head // HKV * batch_stride + head % HKV * head_stride
    row = first_row + tl.arange(0, R_PAD)
    best = tl.full([R_PAD], -float("inf"), tl.float32)
    total = tl.zeros([R_PAD], tl.float32)
    for other in range(num_parts):
        at = partials + (head * num_parts + other) * 2 * ROWS + row
        part_best = tl.load(at, mask=row < ROWS, other=-float("inf"))
        part_total = tl.load(at + ROWS, mask=row < ROWS, other=0.0)
        higher = tl.maximum(best, part_best)
        safe = tl.where(higher > -float("inf"), higher, 0.0)
        total = total * tl.exp(best - safe) + part_total * tl.exp(part_best - safe)
        best = higher
    safe = tl.where(best > -float("inf"), best, 0.0)
    share = tl.where(total > 0, 1.0 / total, 0.0)  # a padded query sees nothing, and no number is worth nothing
    scores += (head * tl.num_programs(2) + tl.program_id(2)) * num_tokens
    begin = part * part_size
    end = tl.minimum(begin + part_size, num_tokens)
    for start in range(begin, end, TILE):
        logits = _window_logits(
            query, keys, head, length, seeing, first_row, start, scale, ROWS, W, D, R_PAD, D_PAD, TILE
        )
        mass = tl.where(share[:, None] > 0, tl.exp(logits - safe[:, None]) * share[:, None], 0.0)
        token = start + tl.arange(0, TILE)
        tl.store(scores + token, tl.max(mass, 0) if BY_PEAK else tl.sum(mass, 0), mask=token < end)
