"""The kernels behind `triton.py`: one decode step of one layer in three launches, append and score, choose, attend.

Grids follow from capacities, so that a step could be captured: lengths are read on the device, and programs beyond them
have nothing to do. The new token counts as stored from the first kernel on; the last one adds it to the lengths.

Tensors are those of `LayerTensors`, dense. A unit is what has a score: a page, or a token where each is scored. The
scratch: `logits` `[B, Hkv, G, units]` float32; `partials` `[B, Hkv, parts, 2, G]` float32, a part's largest logit and
the sum of its tokens' exponentials relative to that; `scores` `[B, Hkv, units]` float32; `chosen` `[B, Hkv, top_k]`
int32, places, ascending; `pieces` `[B, Hkv, pieces, G, D]` float32, weighted values, and `states`
`[B, Hkv, pieces, 2, G]` float32, their largest logits and sums of weights; `pieces_done` `[B, Hkv]` int32, zero between
steps; `sizes` `[B, Hkv, D_PAD]` float32, how large the queries are along each channel, what channels are chosen by.

The spread of an index, if there is one, is `[B, Hkv, D]` float32. It is read as it was before the new token, which
`choose` lets it take in.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
PAGES_PER_BLOCK = tl.constexpr(32)  # see ops/pages.py
GROUP = tl.constexpr(64)  # this and the next two: see ops/lowbit.py
GROUPS_PER_BLOCK = tl.constexpr(16)
LEVELS = tl.constexpr(15)
STEP_CHANNELS = tl.constexpr(32)  # this and the next: see ops/int8.py
NOT_FINITE = tl.constexpr(-128)
CHANNELS = tl.constexpr(32)  # looked at together, so that registers hold them
HALF = tl.constexpr(GROUP.value // 2)  # tokens whose codes are the low halves of bytes
SIZES = ("token_capacity", "position_capacity", "num_blocks", "num_units", "num_parts", "num_pieces", "most_chosen")


@triton.jit
def _order(numbers):
    """Float32 numbers that are not negative as uint32 in the same order; what is no number is above them all."""
    return numbers.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def product(a, b):
    """`[M, K]` times `[K, N]`, summed in float32."""
    if INTERPRETED:  # there the bits of bfloat16 are taken for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _rounded(numbers, dtype: tl.constexpr):
    """Float32 numbers in another dtype, the nearest: the interpreter would cut what bfloat16 lacks off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = numbers.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        numbers = tl.where(numbers == numbers, nearest.to(tl.float32, bitcast=True), numbers)
    return numbers.to(dtype)


@triton.jit
def _step(exponents):
    """Two to the power of these exponents, float32; minus infinity for NOT_FINITE."""
    return ((exponents.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store_in_8_bits(codes, exponents, row, D: tl.constexpr, D_PAD: tl.constexpr):
    """Store a row, `[D]`, zero beyond D; returns it as it will be restored. See `quantize_rows` in ops/int8.py."""
    WIDTH: tl.constexpr = min(D_PAD, STEP_CHANNELS)
    least: tl.constexpr = -24 if row.dtype == tl.float16 else -126
    blocks = row.to(tl.float32).reshape(D_PAD // WIDTH, WIDTH)
    raised = (tl.max(_order(blocks), 1) >> 23).to(tl.int32)
    exponent = tl.where(raised == 255, NOT_FINITE, tl.maximum(raised - (127 + 6), least))
    step = tl.broadcast_to(_step(exponent)[:, None], blocks.shape)
    code = tl.minimum(tl.maximum(tl.div_rn(blocks, step), -127.0), 127.0)
    code = tl.where((raised == 255)[:, None], 0.0, (code + 12582912.0) - 12582912.0)  # 1.5 * 2**23: rounds
    channel, block = tl.arange(0, D_PAD), tl.arange(0, D_PAD // WIDTH)
    tl.store(codes + channel, code.to(tl.int8).reshape(D_PAD), mask=channel < D)
    tl.store(exponents + block, exponent.to(tl.int8), mask=block * WIDTH < D)
    return (code * step).to(row.dtype).reshape(D_PAD)


@triton.jit
def _load_rows(
    rows, where, exponents, slots, is_token, first, D: tl.constexpr, D_PAD: tl.constexpr, dtype: tl.constexpr
):
    """Keys or values of `slots`, at `where`, `[TILE, D]` in `dtype`; exponents, if any, from a token's `first` on."""
    mask = is_token[:, None] & (tl.arange(0, D_PAD) < D)[None, :]
    tile = tl.load(rows + where, mask=mask, other=0)
    if exponents is not None:
        STEPS: tl.constexpr = (D + STEP_CHANNELS - 1) // STEP_CHANNELS
        at = exponents + (slots * (2 * STEPS) + first)[:, None] + (tl.arange(0, D_PAD) // STEP_CHANNELS)[None, :]
        tile = (tile.to(tl.float32) * _step(tl.load(at, mask=mask, other=0))).to(dtype)
    return tile


@triton.jit
def _load_query(query, head, start, G: tl.constexpr, D: tl.constexpr, G_PAD: tl.constexpr, WIDTH: tl.constexpr):
    """`WIDTH` channels, from `start` on, of the queries of a KV head, `[G, WIDTH]`; zero beyond G and D."""
    group, channel = tl.arange(0, G_PAD), start + tl.arange(0, WIDTH)
    mask = (group[:, None] < G) & (channel[None, :] < D)
    return tl.load(query + (head * G + group[:, None]) * D + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _store_sizes(
    sizes, query, spread, head, G: tl.constexpr, D: tl.constexpr, G_PAD: tl.constexpr, D_PAD: tl.constexpr
):
    """Store how large a head's queries are along each channel, |q| over the group times the spread, if there is one.

    Every program of a head does, and stores the same. Sums that differ in layout differ in their last bits, so that
    sizes are compared as they are stored.
    """
    STEP: tl.constexpr = min(D_PAD, CHANNELS)
    for start in range(0, D_PAD, STEP):
        channel = start + tl.arange(0, STEP)
        size = tl.sum(tl.abs(_load_query(query, head, start, G, D, G_PAD, STEP).to(tl.float32)), 0)
        if spread is not None:
            size *= tl.load(spread + head * D + channel, mask=channel < D, other=0.0)
        tl.store(sizes + head * D_PAD + channel, size)
    tl.debug_barrier()


@triton.jit
def _channel_order(sizes, head, start, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers in the order of the stored sizes of channels; no two are equal."""
    channel = start + tl.arange(0, WIDTH)
    order = _order(tl.load(sizes + head * D_PAD + channel)).to(tl.int64)
    return tl.where(channel < D, order * D_PAD + (D_PAD - 1 - channel), -1)


@triton.jit
def _are_largest(sizes, head, start, num_channels, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr):
    """Mark those of the `WIDTH` channels from `start` on that are read: `[WIDTH]` bool.

    Read are the `num_channels` whose stored sizes are the largest; see `largest_channels` in ops/channels.py. A channel
    is among them if fewer come before it.
    """
    order = _channel_order(sizes, head, start, D, D_PAD, WIDTH)
    num_before = tl.zeros([WIDTH], tl.int32)
    STEP: tl.constexpr = min(D_PAD, CHANNELS)
    for first in range(0, D_PAD, STEP):
        others = _channel_order(sizes, head, first, D, D_PAD, STEP)
        num_before += tl.sum((others[None, :] > order[:, None]).to(tl.int32), 1)
    return num_before < num_channels


@triton.jit
def group_start(head, group, num_blocks, D: tl.constexpr):
    """Where, counted in groups of one channel, that of channel 0 of a group of tokens stands."""
    block = group // GROUPS_PER_BLOCK
    return (head * num_blocks + block) * (D * GROUPS_PER_BLOCK) + (group - block * GROUPS_PER_BLOCK)


@triton.jit
def _range_of(least, most, mask):
    """Ranges of numbers along dim 1, float32, `mask` says which count; 0 of none; what is no number stays."""
    low = tl.where(mask, least.to(tl.float32), float("inf"))
    high = tl.where(mask, most.to(tl.float32), -float("inf"))
    is_broken = tl.sum(((low != low) | (high != high)).to(tl.int32), 1) > 0  # minima pass over no numbers
    span = tl.max(high, 1) - tl.min(low, 1)
    return tl.where(is_broken, float("nan"), tl.where(span < 0, 0.0, span))


@triton.jit
def lowbit_range(ranges, open_keys, head, group, length, num_blocks, channel, D: tl.constexpr):
    """What a group adds to the spread of these channels: its steps, or the range of its keys if it is the open one."""
    is_channel = channel < D
    if length >= (group + 1) * GROUP:
        row = group_start(head, group, num_blocks, D) + channel * GROUPS_PER_BLOCK
        span = tl.load(ranges + row * 2 + 1, mask=is_channel, other=0.0).to(tl.float32)
    else:
        token = tl.arange(0, GROUP)
        mask = is_channel[:, None] & (token + group * GROUP < length)[None, :]
        keys = tl.load(open_keys + (head * D + channel[:, None]) * GROUP + token[None, :], mask=mask, other=0.0)
        span = _range_of(keys, keys, mask)
    return span


@triton.jit
def page_range(bounds, head, block, length, size, num_blocks, channel, NUM_ROWS: tl.constexpr, D: tl.constexpr):
    """What a block of pages adds to the spread of these channels: the range of its keys."""
    page = tl.arange(0, PAGES_PER_BLOCK)
    mask = (channel < D)[:, None] & ((page + block * PAGES_PER_BLOCK) * size < length)[None, :]
    at = bounds + ((head * num_blocks + block) * NUM_ROWS + channel[:, None]) * PAGES_PER_BLOCK + page[None, :]
    least = tl.load(at, mask=mask, other=0.0)
    most = tl.load(at + (NUM_ROWS - D) * PAGES_PER_BLOCK, mask=mask, other=0.0)
    return _range_of(least, most, mask)


@triton.jit
def _extend_spread(
    spread, bounds, ranges, open_keys, head, length, size, num_blocks, NUM_ROWS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr
):  # fmt: skip
    """Let the spread of a head take in its newest token; see `append_lowbit` and `extend_spread` in ops."""
    tokens = GROUP if bounds is None else PAGES_PER_BLOCK * size  # of a run
    run = (length - 1) // tokens
    if (run == 0) | (length % tokens == 0):
        STEP: tl.constexpr = min(D_PAD, CHANNELS)
        for start in range(0, D_PAD, STEP):
            channel = start + tl.arange(0, STEP)
            if bounds is None:
                span = lowbit_range(ranges, open_keys, head, run, length, num_blocks, channel, D)
            else:
                span = page_range(bounds, head, run, length, size, num_blocks, channel, NUM_ROWS, D)
            at = spread + head * D + channel
            earlier = tl.load(at, mask=channel < D, other=0.0)
            tl.store(at, tl.where(run == 0, span, earlier + span), mask=channel < D)


@triton.jit
def _fold_key(bounds, key, first, NUM_ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Let the page whose bounds begin at `first` take in a key, `[D]`; see `fold_into_pages` in ops/pages.py."""
    channel = tl.arange(0, D_PAD)
    for start in tl.static_range(0, NUM_ROWS, D):
        at = bounds + first + (start + channel) * PAGES_PER_BLOCK
        new, old = key.to(tl.float32), tl.load(at, mask=channel < D).to(tl.float32)
        is_beyond = new > old if start + D == NUM_ROWS else new < old
        tl.store(at, key, mask=(channel < D) & (is_beyond | (new != new)))


@triton.jit
def close_group(codes, ranges, keys, channel_stride, token_stride, first, D: tl.constexpr, D_PAD: tl.constexpr):
    """Quantize a full group of keys, whose channels are to begin at `first`; see `quantize_groups` in ops/lowbit.py."""
    token = tl.arange(0, HALF)
    for start in range(0, D_PAD, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        is_channel = channel < D
        at = keys + channel[:, None] * channel_stride + token[None, :] * token_stride
        early = tl.load(at, mask=is_channel[:, None], other=0.0).to(tl.float32)
        late = tl.load(at + HALF * token_stride, mask=is_channel[:, None], other=0.0).to(tl.float32)
        is_broken = tl.sum(((early != early) | (late != late)).to(tl.int32), 1) > 0  # minima pass over no numbers
        low = tl.where(is_broken, float("nan"), tl.minimum(tl.min(early, 1), tl.min(late, 1)))
        high = tl.maximum(tl.max(early, 1), tl.max(late, 1))
        step = _rounded(tl.div_rn(high - low, tl.full([CHANNELS], LEVELS, tl.float32)), ranges.dtype.element_ty)
        packed = _codes(early, low, step) | (_codes(late, low, step) << 4)
        row = first + channel * GROUPS_PER_BLOCK
        tl.store(codes + row[:, None] * HALF + token[None, :], packed.to(tl.uint8), mask=is_channel[:, None])
        tl.store(ranges + row * 2, low.to(step.dtype), mask=is_channel)
        tl.store(ranges + row * 2 + 1, step, mask=is_channel)


@triton.jit
def _codes(keys, low, step):
    """The nearest steps above `low`, 0 to LEVELS, of keys `[D, HALF]`; 0 where a channel has one value only."""
    width = tl.broadcast_to(step.to(tl.float32)[:, None], keys.shape)
    steps = tl.div_rn(keys - low[:, None], width)
    steps = tl.where(steps == steps, tl.minimum(tl.maximum(steps, 0.0), LEVELS), 0.0)
    return ((steps + 8388608.0) - 8388608.0).to(tl.int32)  # 2**23: beyond it there are whole numbers only


@triton.jit
def _lowbit_products(q, is_read, codes, ranges, open_keys, head, first, start, is_closed, D: tl.constexpr):
    """Products of queries, `[G, WIDTH]` from channel `start` on, with a group's keys, `[G, GROUP]`.

    See `lowbit_logits` in ops/lowbit.py.
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
        weights = _rounded(read * step[None, :], dtype)
        offsets = tl.sum(read * low[None, :], 1)[:, None]
        early = product(weights, (packed & 15).to(tl.float32).to(dtype)) + offsets
        late = product(weights, (packed >> 4).to(tl.float32).to(dtype)) + offsets
    else:
        at = open_keys + (head * D + channel[:, None]) * GROUP + token[None, :]
        early = product(q, tl.load(at, mask=mask, other=0.0))
        late = product(q, tl.load(at + HALF, mask=mask, other=0.0))
    return tl.permute(tl.join(early, late), (0, 2, 1)).reshape(q.shape[0], GROUP)


@triton.jit(do_not_specialize=SIZES)
def append_and_score(
    query,
    key,
    value,
    keys,
    values,
    exponents,
    positions,
    lengths,
    archive_lengths,
    seen,
    bounds,
    codes,
    ranges,
    open_keys,
    spread,
    page_size,
    num_channels,
    dense_lengths,
    sizes,
    logits,
    partials,
    scale,
    token_capacity,
    position_capacity,
    num_blocks,
    num_units,
    num_parts,
    SCORING: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    G_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the new token; give `PART` units of a head their logits, `WIDTH` channels at once. Grid: heads, parts.

    Reads what the scoring reads of the index (or of the keys), and the query once for each part.
    """
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = head // HKV
    place = tl.load(lengths + head).to(tl.int32)  # of the new token
    size = tl.load(page_size + row).to(tl.int32) if page_size is not None else 1
    own = place // size
    channel, group = tl.arange(0, D_PAD), tl.arange(0, G_PAD)
    is_channel = channel < D
    if part == (0 if SCORING == "dense" else own // PART):
        new_key = tl.load(key + head * D + channel, mask=is_channel, other=0.0)
        new_value = tl.load(value + head * D + channel, mask=is_channel, other=0.0)
        slot = head * token_capacity + (tl.load(archive_lengths + head) if archive_lengths is not None else place)
        if exponents is not None:
            STEPS: tl.constexpr = (D + STEP_CHANNELS - 1) // STEP_CHANNELS
            new_key = _store_in_8_bits(keys + slot * D, exponents + slot * (2 * STEPS), new_key, D, D_PAD)
            _store_in_8_bits(values + slot * D, exponents + slot * (2 * STEPS) + STEPS, new_value, D, D_PAD)
        else:
            tl.store(keys + slot * D + channel, new_key, mask=is_channel)
            tl.store(values + slot * D + channel, new_value, mask=is_channel)
        tl.store(positions + head * position_capacity + place, tl.load(seen + row).to(tl.int32))
        if bounds is not None:
            first = (head * num_blocks + own // PAGES_PER_BLOCK) * NUM_ROWS * PAGES_PER_BLOCK
            _fold_key(bounds, new_key, first + own % PAGES_PER_BLOCK, NUM_ROWS, D, D_PAD)
        if SCORING == "lowbit":
            tl.store(open_keys + (head * D + channel) * GROUP + place % GROUP, new_key, mask=is_channel)
            if place % GROUP == GROUP - 1:
                tl.debug_barrier()
                first = group_start(head, part, num_blocks, D)
                close_group(codes, ranges, open_keys + head * D * GROUP, GROUP, 1, first, D, D_PAD)
        tl.debug_barrier()  # this program scores the new token, too

    if SCORING != "dense":
        length = place + 1
        units = (length + size - 1) // size
        if (length <= tl.load(dense_lengths + row)) | (part * PART >= units):
            return
        unit = part * PART + tl.arange(0, PART)
        most_channels = tl.load(num_channels + row)
        if (SCORING == "lowbit") | (SCORING == "pages"):
            _store_sizes(sizes, query, spread, head, G, D, G_PAD, D_PAD)
        if SCORING != "lowbit":
            q = _load_query(query, head, 0, G, D, G_PAD, D_PAD)
        if SCORING == "exact":
            slots = unit.to(tl.int64)
            is_token = unit < length
            if archive_lengths is not None:
                slots = tl.load(positions + head * position_capacity + unit, mask=is_token, other=0).to(tl.int64)
            tile = tl.load(
                keys + ((head * token_capacity + slots) * D)[:, None] + channel[None, :],
                mask=is_token[:, None] & is_channel[None, :],
                other=0.0,
            )
            products = product(q, tl.trans(tile)) * scale
        elif SCORING == "lowbit":  # a part is a group
            first, is_closed = group_start(head, part, num_blocks, D), length >= (part + 1) * PART
            products = tl.zeros([G_PAD, PART], tl.float32)
            for start in range(0, D_PAD, WIDTH):
                read = _load_query(query, head, start, G, D, G_PAD, WIDTH)
                is_read = _are_largest(sizes, head, start, most_channels, D, D_PAD, WIDTH)
                products += _lowbit_products(read, is_read, codes, ranges, open_keys, head, first, start, is_closed, D)
            products *= scale
        else:
            block = unit // PAGES_PER_BLOCK
            is_there = block * PAGES_PER_BLOCK < units  # whole blocks, so that rows are read in one go
            start = (head * num_blocks + block) * (NUM_ROWS * PAGES_PER_BLOCK) + unit % PAGES_PER_BLOCK
            q32 = q.to(tl.float32)
            if SCORING == "pages":
                is_read = _are_largest(sizes, head, 0, most_channels, D, D_PAD, D_PAD)
                takes_maxima = (tl.sum(q32, 0) > 0) | (NUM_ROWS == D)
                index_row = channel + tl.where(takes_maxima, NUM_ROWS - D, 0)
                tile = tl.load(
                    bounds + start[None, :] + (index_row * PAGES_PER_BLOCK)[:, None],
                    mask=is_read[:, None] & is_there[None, :],
                    other=0.0,
                )
                own_sizes = tl.abs(q32)
                if spread is not None:
                    own_sizes *= tl.load(spread + head * D + channel, mask=is_channel, other=0.0)[None, :]
                share = tl.sum(tl.where(is_read[None, :], own_sizes, 0.0), 1) / tl.sum(own_sizes, 1)
                temperature = scale / tl.sqrt(tl.where(share > 0, share, 1.0))  # all sizes may be zero
                products = product(q, tile) * temperature[:, None]  # where nothing is read the tile is zero
            else:
                products = tl.zeros([G_PAD, PART], tl.float32)
                for first_row in tl.static_range(0, NUM_ROWS, D):
                    tile = tl.load(
                        bounds + start[None, :] + ((first_row + channel) * PAGES_PER_BLOCK)[:, None],
                        mask=is_channel[:, None] & is_there[None, :],
                        other=0.0,
                    )
                    read = q
                    if NUM_ROWS > D:  # minima where the query is negative, maxima where it is positive
                        read = tl.where(q32 > 0 if first_row == 0 else q32 < 0, 0.0, q)
                    products += product(read, tile) * scale
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


@triton.jit
def _count_open(unit, size, first, end):
    """How many of each unit's tokens are at places from `first` to before `end`."""
    return tl.maximum(tl.minimum((unit + 1) * size, end) - tl.maximum(unit * size, first), 0)


@triton.jit(do_not_specialize=SIZES)
def choose(
    lengths,
    page_size,
    top_k,
    dense_lengths,
    sinks,
    recents,
    logits,
    partials,
    scores,
    chosen,
    bounds,
    ranges,
    open_keys,
    spread,
    num_blocks,
    num_units,
    num_parts,
    most_chosen,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    D_PAD: tl.constexpr,
    G_POW: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS_BITS: tl.constexpr,
):
    """Choose a head's tokens; see `score_tokens` and `choose_tokens` in ops/scores.py. Grid: heads.

    Before that the head's spread, if there is one, takes in the new token.

    The score at which to cut is found `WAYS_BITS` bits at a time, until as many tokens as wanted lie above.
    Reads the logits once and the scores `32 / WAYS_BITS + 2` times at most, of one head in cache.
    """
    head = tl.program_id(0).to(tl.int64)
    row = head // HKV
    length = tl.load(lengths + head).to(tl.int32) + 1
    size = tl.load(page_size + row).to(tl.int32) if page_size is not None else 1
    if spread is not None:  # all have chosen their channels
        _extend_spread(spread, bounds, ranges, open_keys, head, length, size, num_blocks, NUM_ROWS, D, D_PAD)
    if length <= tl.load(dense_lengths + row):
        return
    units = (length + size - 1) // size
    lane = tl.arange(0, BLOCK)

    # softmax, mean over the heads
    group = tl.arange(0, G_POW)
    best = tl.full([G_POW], -float("inf"), tl.float32)
    total = tl.zeros([G_POW], tl.float32)
    parts = (units + PART - 1) // PART
    part_lane = tl.arange(0, PART)
    for start in range(0, parts, PART):
        is_part = (group[:, None] < G) & (start + part_lane < parts)[None, :]
        at = partials + (head * num_parts + start + part_lane[None, :]) * (2 * G) + group[:, None]
        part_best = tl.load(at, mask=is_part, other=-float("inf"))
        part_total = tl.load(at + G, mask=is_part, other=0.0)
        higher = tl.maximum(best, tl.max(part_best, 1))
        total = total * tl.exp(best - higher) + tl.sum(part_total * tl.exp(part_best - higher[:, None]), 1)
        best = higher
    for start in range(0, units, BLOCK):
        unit = start + lane
        mask = (group[:, None] < G) & (unit < units)[None, :]
        logit = tl.load(logits + (head * G + group[:, None]) * num_units + unit[None, :], mask=mask, other=0.0)
        shares = tl.where(mask, tl.exp(logit - best[:, None]) / (total * G)[:, None], 0.0)
        tl.store(scores + head * num_units + unit, tl.sum(shares, 0), mask=unit < units)
    tl.debug_barrier()

    # the cut: the largest number such that enough open tokens have a score not below it
    first = tl.minimum(tl.load(sinks + row).to(tl.int32), length)
    end = length - tl.minimum(tl.load(recents + row).to(tl.int32), length - first)
    wanted = tl.load(top_k + row).to(tl.int32) - first - (length - end)
    cut = tl.full([], 0, tl.uint32)
    from_cut = tl.full(
        [], -1, tl.int32
    )  # open tokens with a score not below it; once they are those wanted, it will do
    way = tl.arange(0, 2**WAYS_BITS)
    shift = 32 - WAYS_BITS
    while (shift >= 0) & (from_cut != wanted):
        cuts = cut | (way.to(tl.uint32) << shift)
        counts = tl.zeros([2**WAYS_BITS], tl.int32)
        for start in range(0, units, BLOCK):
            unit = start + lane
            order = _order(tl.load(scores + head * num_units + unit, mask=unit < units, other=0.0))
            tokens = _count_open(unit, size, first, end)
            counts += tl.sum(tl.where(order[:, None] >= cuts[None, :], tokens[:, None], 0), 0)
        best_way = tl.sum((counts >= wanted).to(tl.int32)) - 1
        cut += best_way.to(tl.uint32) << shift
        from_cut = tl.sum(tl.where(way == best_way, counts, 0))
        shift -= WAYS_BITS

    # of those at the cut the earlier ones
    above = tl.full([], 0, tl.int32)
    for start in range(0, units, BLOCK):
        unit = start + lane
        order = _order(tl.load(scores + head * num_units + unit, mask=unit < units, other=0.0))
        above += tl.sum(tl.where(order > cut, _count_open(unit, size, first, end), 0))
    num_tied = tl.full([], 0, tl.int32)
    num_taken = tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK):
        place = start + lane
        is_token = place < length
        order = _order(tl.load(scores + head * num_units + place // size, mask=is_token, other=0.0))
        is_pinned = (place < first) | (place >= end)
        ties = (is_token & (order == cut) & ~is_pinned).to(tl.int32)
        is_early = (ties > 0) & (num_tied + tl.cumsum(ties, 0) <= wanted - above)
        takes = (is_token & (is_pinned | (order > cut) | is_early)).to(tl.int32)
        at = num_taken + tl.cumsum(takes, 0) - 1
        tl.store(chosen + head * most_chosen + at, place, mask=takes > 0)
        num_tied += tl.sum(ties)
        num_taken += tl.sum(takes)


@triton.jit
def _scored_bytes(
    length,
    size,
    num_channels,
    NUM_ROWS: tl.constexpr,
    D: tl.constexpr,
    SCORING: tl.constexpr,
    BYTES: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """What the scoring of a head reads, if an element has so many bytes."""
    pages = (length + size - 1) // size
    SPREAD_BYTES: tl.constexpr = 4 * D if WEIGHTED else 0
    if SCORING == "lowbit":
        return num_channels * (length // GROUP * (HALF + 2 * BYTES) + length % GROUP * BYTES) + SPREAD_BYTES
    if SCORING == "pages":
        return pages * num_channels * BYTES + SPREAD_BYTES
    if SCORING == "bounds":
        return pages * NUM_ROWS * BYTES
    return length * D * BYTES


@triton.jit(do_not_specialize=SIZES)
def attend(
    query,
    output,
    report,
    keys,
    values,
    exponents,
    positions,
    lengths,
    archive_lengths,
    seen,
    page_size,
    num_channels,
    top_k,
    dense_lengths,
    chosen,
    pieces,
    states,
    pieces_done,
    read_bytes,
    scale,
    token_capacity,
    position_capacity,
    num_pieces,
    most_chosen,
    SCORING: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    G_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Attend to the chosen tokens of a head, or to all, in pieces that the last program merges. Grid: heads, pieces.

    Reads `2 * D` elements for each token attended to, or their codes and exponents.
    """
    head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = head // HKV
    length = tl.load(lengths + head) + 1
    selects = False
    count = length
    if SCORING != "dense":
        selects = length > tl.load(dense_lengths + row)
        count = tl.where(selects, tl.load(top_k + row), length)
    piece_size = ((count + num_pieces - 1) // num_pieces + TILE - 1) // TILE * TILE
    used_pieces = (count + piece_size - 1) // piece_size

    channel, group, lane = tl.arange(0, D_PAD), tl.arange(0, G_PAD), tl.arange(0, TILE)
    is_channel, is_head = channel < D, group < G
    q = _load_query(query, head, 0, G, D, G_PAD, D_PAD)
    best = tl.full([G_PAD], -float("inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    sums = tl.zeros([G_PAD, D_PAD], tl.float32)
    STEPS: tl.constexpr = (D + STEP_CHANNELS - 1) // STEP_CHANNELS
    begin = piece * piece_size
    for start in range(begin, tl.minimum(begin + piece_size, count), TILE):
        at = start + lane
        is_token = at < count
        place = at
        if SCORING != "dense":
            is_chosen = at < tl.where(selects, count, 0)
            place = tl.where(selects, tl.load(chosen + head * most_chosen + at, mask=is_chosen, other=0), at)
        slot = place
        if archive_lengths is not None:
            slot = tl.load(positions + head * position_capacity + place, mask=is_token, other=0).to(tl.int64)
        if report is not None:
            tl.store(report + head * position_capacity + at, place.to(tl.int32), mask=is_token)
        slot += head * token_capacity
        where = (slot * D)[:, None] + channel[None, :]
        k = _load_rows(keys, where, exponents, slot, is_token, 0, D, D_PAD, q.dtype)
        v = _load_rows(values, where, exponents, slot, is_token, STEPS, D, D_PAD, q.dtype)
        logits = tl.where(is_token[None, :], product(q, tl.trans(k)) * scale, -float("inf"))
        higher = tl.maximum(best, tl.max(logits, 1))
        weights = _rounded(tl.exp(logits - higher[:, None]), v.dtype)
        shrunk = tl.exp(best - higher)
        total = total * shrunk + tl.sum(weights.to(tl.float32), 1)  # of the weights as rounded
        sums = sums * shrunk[:, None] + product(weights, v)
        best = higher

    is_out = is_head[:, None] & is_channel[None, :]
    own = head * num_pieces + piece
    is_own = group < tl.where(piece < used_pieces, G, 0)
    tl.store(
        pieces + (own * G + group[:, None]) * D + channel[None, :], sums, mask=is_own[:, None] & is_channel[None, :]
    )
    tl.store(states + own * (2 * G) + group, best, mask=is_own)
    tl.store(states + own * (2 * G) + G + group, total, mask=is_own)
    tl.debug_barrier()
    if tl.atomic_add(pieces_done + head, 1, sem="acq_rel") < num_pieces - 1:  # all have read the length
        return

    best = tl.full([G_PAD], -float("inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    sums = tl.zeros([G_PAD, D_PAD], tl.float32)
    for other in range(used_pieces):
        at = head * num_pieces + other
        piece_best = tl.load(states + at * (2 * G) + group, mask=is_head, other=0.0, cache_modifier=".cg")
        piece_total = tl.load(states + at * (2 * G) + G + group, mask=is_head, other=1.0, cache_modifier=".cg")
        piece_sums = tl.load(
            pieces + (at * G + group[:, None]) * D + channel[None, :], mask=is_out, other=0.0, cache_modifier=".cg"
        )
        higher = tl.maximum(best, piece_best)
        shrunk, grown = tl.exp(best - higher), tl.exp(piece_best - higher)
        total = total * shrunk + piece_total * grown
        sums = sums * shrunk[:, None] + piece_sums * grown[:, None]
        best = higher
    mean = _rounded(sums / total[:, None], output.dtype.element_ty)
    tl.store(output + (head * G + group[:, None]) * D + channel[None, :], mean, mask=is_out)

    size = tl.load(page_size + row) if page_size is not None else 1
    BYTES: tl.constexpr = query.dtype.element_ty.primitive_bitwidth // 8
    TOKEN_BYTES: tl.constexpr = 2 * D * BYTES if exponents is None else 2 * (D + STEPS)
    scored = _scored_bytes(length, size, tl.load(num_channels + row), NUM_ROWS, D, SCORING, BYTES, WEIGHTED)
    tl.store(read_bytes + head, count * TOKEN_BYTES + tl.where(selects, scored, 0))
    if report is not None:
        tl.store(report + head * position_capacity + count, -1, mask=count < position_capacity)
    tl.store(pieces_done + head, 0)
    tl.store(lengths + head, length)
    if archive_lengths is not None:
        tl.store(archive_lengths + head, tl.load(archive_lengths + head) + 1)
    if head % HKV == 0:
        tl.store(seen + row, tl.load(seen + row) + 1)
