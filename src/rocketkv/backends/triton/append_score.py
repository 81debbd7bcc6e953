"""The first launch of a decode step: store the new token, then score the units of a head, part by part.

step.py describes the tensors. A unit is what has a score: a page, or a token where each token is scored.
"""

import triton
import triton.language as tl

from rocketkv.backends.triton.channels import are_largest, rank_channels
from rocketkv.backends.triton.common import UNSPECIALIZED, capped, load_query, product
from rocketkv.backends.triton.int8 import num_steps, store_in_8_bits
from rocketkv.backends.triton.lowbit import GROUP, close_group, group_start, lowbit_products
from rocketkv.backends.triton.pages import PAGES_PER_BLOCK, fold_key, page_start


@triton.jit(do_not_specialize=UNSPECIALIZED)
def append_and_score(
    query, key, value, keys, values, exponents, positions, lengths, archive_lengths, seen, bounds, codes, ranges,
    open_keys, spread, page_size, num_channels, dense_lengths, channel_sizes, channel_ranks, logits, partials, scale,
    softcap, token_capacity, position_capacity, num_blocks, num_units, num_parts, parts_per_program,
    SCORING: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, NUM_ROWS: tl.constexpr,
    G_PAD: tl.constexpr, D_PAD: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Store the new token; compute the logits of a head's units, `PART` units and `WIDTH` channels at once.

    Grid: heads, programs that take `parts_per_program` parts each. The kernel reads what the scoring reads of the index
    (or of the keys), and the query once for each part. A program chooses the channels once for all its parts.
    """
    head, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = head // HKV
    rank = tl.load(lengths + head).to(tl.int32)  # the new token's rank
    size = tl.load(page_size + row).to(tl.int32) if page_size is not None else 1
    own = rank // size  # the new token's unit
    if program == (0 if SCORING == "dense" else own // PART // parts_per_program):
        new_key = _store_token(
            key, value, keys, values, exponents, archive_lengths, head, rank, token_capacity, D, D_PAD
        )
        tl.store(positions + head * position_capacity + rank, tl.load(seen + row).to(tl.int32))
        if bounds is not None:
            fold_key(bounds, new_key, page_start(head, own, num_blocks, NUM_ROWS), NUM_ROWS, D, D_PAD)
        if SCORING == "lowbit":
            _append_lowbit(codes, ranges, open_keys, new_key, head, rank, num_blocks, D, D_PAD)
        tl.debug_barrier()  # this program scores the new token, too

    if SCORING != "dense":
        length = rank + 1
        units = (length + size - 1) // size
        begin = program * parts_per_program
        end = tl.minimum(begin + parts_per_program, (units + PART - 1) // PART)
        if (length <= tl.load(dense_lengths + row)) | (begin >= end):
            return
        most_channels = tl.load(num_channels + row)
        if (SCORING == "lowbit") | (SCORING == "pages"):
            rank_channels(channel_sizes, channel_ranks, query, spread, head, G, D, G_PAD, D_PAD)
        if SCORING != "lowbit":
            q = load_query(query, head, 0, G, D, G_PAD, D_PAD)
        if SCORING == "pages":
            is_read = are_largest(channel_ranks, head, 0, most_channels, D_PAD, D_PAD)
            temperatures = _temperatures(q, is_read, spread, head, scale, D, D_PAD)
        for part in tl.range(begin, end, num_stages=2):  # three stages would take twice the shared memory
            unit = part * PART + tl.arange(0, PART)
            if SCORING == "lowbit":
                products = _score_lowbit(
                    query, codes, ranges, open_keys, channel_ranks, head, part, length, most_channels, num_blocks,
                    scale, G, D, G_PAD, D_PAD, WIDTH
                )  # fmt: skip
            elif SCORING == "exact":
                slots = unit.to(tl.int64)
                if archive_lengths is not None:
                    at = positions + head * position_capacity + unit
                    slots = tl.load(at, mask=unit < length, other=0).to(tl.int64)
                products = _score_exact(q, keys, head * token_capacity + slots, unit < length, scale, D, D_PAD)
            else:
                is_there = unit // PAGES_PER_BLOCK * PAGES_PER_BLOCK < units  # whole blocks make the reads contiguous
                start = page_start(head, unit, num_blocks, NUM_ROWS)
                if SCORING == "pages":
                    products = _score_pages(q, is_read, temperatures, bounds, start, is_there, NUM_ROWS, D, D_PAD)
                else:
                    products = _score_bounds(q, bounds, start, is_there, scale, NUM_ROWS, D, D_PAD)
            if softcap is not None:
                products = capped(products, softcap)
            _store_logits(
                logits, partials, products, head, part, unit, units, size, length, num_units, num_parts, G, G_PAD
            )


@triton.jit
def _store_token(
    key, value, keys, values, exponents, archive_lengths, head, rank, token_capacity, D: tl.constexpr,
    D_PAD: tl.constexpr
):  # fmt: skip
    """Store a head's new key and value behind all others; return the key `[D_PAD]` as later steps will read it."""
    channel = tl.arange(0, D_PAD)
    is_channel = channel < D
    new_key = tl.load(key + head * D + channel, mask=is_channel, other=0.0)
    new_value = tl.load(value + head * D + channel, mask=is_channel, other=0.0)
    slot = head * token_capacity + (tl.load(archive_lengths + head) if archive_lengths is not None else rank)
    if exponents is not None:
        STEPS: tl.constexpr = num_steps(D)
        new_key = store_in_8_bits(keys + slot * D, exponents + slot * (2 * STEPS), new_key, D, D_PAD)
        store_in_8_bits(values + slot * D, exponents + slot * (2 * STEPS) + STEPS, new_value, D, D_PAD)
    else:
        tl.store(keys + slot * D + channel, new_key, mask=is_channel)
        tl.store(values + slot * D + channel, new_value, mask=is_channel)
    return new_key


@triton.jit
def _append_lowbit(codes, ranges, open_keys, new_key, head, rank, num_blocks, D: tl.constexpr, D_PAD: tl.constexpr):
    """Add a key to the open group, and quantize the group if it is full; `choose` updates the spread."""
    channel = tl.arange(0, D_PAD)
    tl.store(open_keys + (head * D + channel) * GROUP + rank % GROUP, new_key, mask=channel < D)
    if rank % GROUP == GROUP - 1:
        tl.debug_barrier()
        first = group_start(head, rank // GROUP, num_blocks, D)
        close_group(codes, ranges, open_keys + head * D * GROUP, GROUP, 1, first, D, D_PAD)


@triton.jit
def _score_exact(q, keys, slots, is_token, scale, D: tl.constexpr, D_PAD: tl.constexpr):
    """Return the logits, `[G_PAD, PART]`, of the whole keys in these slots."""
    channel = tl.arange(0, D_PAD)
    mask = is_token[:, None] & (channel < D)[None, :]
    tile = tl.load(keys + (slots * D)[:, None] + channel[None, :], mask=mask, other=0.0)
    return product(q, tl.trans(tile)) * scale


@triton.jit
def _score_lowbit(
    query, codes, ranges, open_keys, channel_ranks, head, group, length, num_channels, num_blocks, scale,
    G: tl.constexpr, D: tl.constexpr, G_PAD: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Return the logits, `[G_PAD, GROUP]`, of a group's keys along the channels that are read; a part is a group."""
    first, is_closed = group_start(head, group, num_blocks, D), length >= (group + 1) * GROUP
    products = tl.zeros([G_PAD, GROUP], tl.float32)
    for start in range(0, D_PAD, WIDTH):
        q = load_query(query, head, start, G, D, G_PAD, WIDTH)
        is_read = are_largest(channel_ranks, head, start, num_channels, D_PAD, WIDTH)
        products += lowbit_products(q, is_read, codes, ranges, open_keys, head, first, start, is_closed, D)
    products *= scale
    return products


@triton.jit
def _temperatures(q, is_read, spread, head, scale, D: tl.constexpr, D_PAD: tl.constexpr):
    """Return SparQ's factors, `[G_PAD]`, on the products along the channels read; see `hybrid_logits`."""
    channel = tl.arange(0, D_PAD)
    sizes = tl.abs(q.to(tl.float32))
    if spread is not None:
        sizes *= tl.load(spread + head * D + channel, mask=channel < D, other=0.0)[None, :]
    share = tl.sum(tl.where(is_read[None, :], sizes, 0.0), 1) / tl.sum(sizes, 1)
    return scale / tl.sqrt(tl.where(share > 0, share, 1.0))  # the share is NaN where all sizes are zero


@triton.jit
def _score_pages(
    q, is_read, temperatures, bounds, start, is_there, NUM_ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):
    """Return the logits, `[G_PAD, PART]`, of one bound of each page along the channels read; see `hybrid_logits`."""
    takes_maxima = (tl.sum(q.to(tl.float32), 0) > 0) | (NUM_ROWS == D)
    index_row = tl.arange(0, D_PAD) + tl.where(takes_maxima, NUM_ROWS - D, 0)
    tile = tl.load(
        bounds + start[None, :] + (index_row * PAGES_PER_BLOCK)[:, None],
        mask=is_read[:, None] & is_there[None, :],
        other=0.0,
    )
    return product(q, tile) * temperatures[:, None]  # the tile is zero where nothing was read


@triton.jit
def _score_bounds(q, bounds, start, is_there, scale, NUM_ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Return upper bounds, `[G_PAD, PART]`, of the logits in each page; see `bound_logits` in ops/pages.py."""
    channel = tl.arange(0, D_PAD)
    q32 = q.to(tl.float32)
    products = tl.zeros([q.shape[0], start.shape[0]], tl.float32)
    for first_row in tl.static_range(0, NUM_ROWS, D):
        tile = tl.load(
            bounds + start[None, :] + ((first_row + channel) * PAGES_PER_BLOCK)[:, None],
            mask=(channel < D)[:, None] & is_there[None, :],
            other=0.0,
        )
        read = q
        if NUM_ROWS > D:  # minima count where the query is negative, maxima where it is positive
            read = tl.where(q32 > 0 if first_row == 0 else q32 < 0, 0.0, q)
        products += product(read, tile) * scale
    return products


@triton.jit
def _store_logits(
    logits, partials, products, head, part, unit, units, size, length, num_units, num_parts, G: tl.constexpr,
    G_PAD: tl.constexpr
):  # fmt: skip
    """Store a part's logits, their largest, and the sum of its tokens' exponentials relative to the largest."""
    group = tl.arange(0, G_PAD)
    is_unit = unit < units
    products = tl.where(is_unit[None, :], products, -float("inf"))
    tl.store(
        logits + (head * G + group[:, None]) * num_units + unit[None, :],
        products,
        mask=(group[:, None] < G) & is_unit[None, :],
    )
    best = tl.max(products, 1)
    tokens = tl.where(is_unit, tl.minimum(length - unit * size, size), 0).to(tl.float32)
    total = tl.sum(tl.where(is_unit[None, :], tl.exp(products - best[:, None]), 0.0) * tokens[None, :], 1)
    at = partials + (head * num_parts + part) * (2 * G) + group
    tl.store(at, best, mask=group < G)
    tl.store(at + G, total, mask=group < G)
