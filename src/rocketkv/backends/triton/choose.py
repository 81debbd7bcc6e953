"""The second launch of a decode step: turn the logits into one score per unit, then choose the tokens to attend to.

step.py describes the tensors; `score_tokens` and `choose_tokens` in ops/scores.py specify the results.
"""

import triton
import triton.language as tl

from rocketkv.backends.triton.common import CHANNELS, UNSPECIALIZED, ordered
from rocketkv.backends.triton.lowbit import GROUP, lowbit_range
from rocketkv.backends.triton.pages import PAGES_PER_BLOCK, page_range


@triton.jit(do_not_specialize=UNSPECIALIZED)
def choose(
    lengths, page_size, top_k, dense_lengths, sinks, recents, sink_logits, logits, partials, scores, chosen, bounds,
    ranges, open_keys, spread, num_blocks, num_units, num_parts, most_chosen, HKV: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, NUM_ROWS: tl.constexpr, D_PAD: tl.constexpr, G_POW: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr, WAYS_BITS: tl.constexpr
):  # fmt: skip
    """Update a head's spread, if there is one, with the new token; then choose the head's tokens. Grid: heads.

    The kernel reads the logits once and the scores at most `32 / WAYS_BITS + 2` times, mostly from the cache.
    """
    head = tl.program_id(0).to(tl.int64)
    row = head // HKV
    length = tl.load(lengths + head).to(tl.int32) + 1
    size = tl.load(page_size + row).to(tl.int32) if page_size is not None else 1
    if spread is not None:  # no program still chooses channels by the earlier spread
        _extend_spread(spread, bounds, ranges, open_keys, head, length, size, num_blocks, NUM_ROWS, D, D_PAD)
    if length <= tl.load(dense_lengths + row):
        return
    units = (length + size - 1) // size
    if sink_logits is not None:
        sink_logits += head % HKV * G
    _store_scores(scores, logits, partials, sink_logits, head, units, num_units, num_parts, G, G_POW, PART, BLOCK)
    tl.debug_barrier()
    first = tl.minimum(tl.load(sinks + row).to(tl.int32), length)
    end = length - tl.minimum(tl.load(recents + row).to(tl.int32), length - first)
    wanted = tl.load(top_k + row).to(tl.int32) - first - (length - end)
    cut = _find_cut(scores, head, units, num_units, size, first, end, wanted, BLOCK, WAYS_BITS)
    _store_chosen(chosen, scores, head, length, units, num_units, most_chosen, size, first, end, wanted, cut, BLOCK)


@triton.jit
def _extend_spread(
    spread, bounds, ranges, open_keys, head, length, size, num_blocks, NUM_ROWS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr
):  # fmt: skip
    """Update the spread of a head with its newest token; see `append_lowbit` and `extend_spread` in ops."""
    tokens = GROUP if bounds is None else PAGES_PER_BLOCK * size  # the tokens of a run, a group or a block of pages
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
def _store_scores(
    scores, logits, partials, sink_logits, head, units, num_units, num_parts, G: tl.constexpr, G_POW: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Store the scores of a head's units: the softmax over all tokens and the sink, as a mean over the group."""
    group = tl.arange(0, G_POW)
    best = tl.full([G_POW], -float("inf"), tl.float32)
    total = tl.zeros([G_POW], tl.float32)
    if sink_logits is not None:
        best, total = tl.load(sink_logits + group, mask=group < G, other=0.0), total + 1.0
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
        unit = start + tl.arange(0, BLOCK)
        mask = (group[:, None] < G) & (unit < units)[None, :]
        logit = tl.load(logits + (head * G + group[:, None]) * num_units + unit[None, :], mask=mask, other=0.0)
        shares = tl.where(mask, tl.exp(logit - best[:, None]) / (total * G)[:, None], 0.0)
        tl.store(scores + head * num_units + unit, tl.sum(shares, 0), mask=unit < units)


@triton.jit
def _find_cut(scores, head, units, num_units, size, first, end, wanted, BLOCK: tl.constexpr, WAYS_BITS: tl.constexpr):
    """Return the cut: the largest number, as `ordered`, such that at least `wanted` open tokens are not below it.

    Open tokens have ranks from `first` to before `end` and are chosen by their scores alone. The search finds
    `WAYS_BITS` bits of the cut at a time, and ends early once exactly `wanted` tokens are not below the number so far.
    """
    cut = tl.full([], 0, tl.uint32)
    from_cut = tl.full([], -1, tl.int32)  # the number of open tokens with a score not below the cut
    way = tl.arange(0, 2**WAYS_BITS)
    shift = 32 - WAYS_BITS
    while (shift >= 0) & (from_cut != wanted):
        cuts = cut | (way.to(tl.uint32) << shift)
        counts = tl.zeros([2**WAYS_BITS], tl.int32)
        for start in range(0, units, BLOCK):
            unit = start + tl.arange(0, BLOCK)
            order = ordered(tl.load(scores + head * num_units + unit, mask=unit < units, other=0.0))
            tokens = _count_open(unit, size, first, end)
            counts += tl.sum(tl.where(order[:, None] >= cuts[None, :], tokens[:, None], 0), 0)
        best_way = tl.sum((counts >= wanted).to(tl.int32)) - 1
        cut += best_way.to(tl.uint32) << shift
        from_cut = tl.sum(tl.where(way == best_way, counts, 0))
        shift -= WAYS_BITS
    return cut


@triton.jit
def _store_chosen(
    chosen, scores, head, length, units, num_units, most_chosen, size, first, end, wanted, cut, BLOCK: tl.constexpr
):
    """Store the ranks of the pinned tokens and of `wanted` open ones: those above the cut, then the earliest at it."""
    above = tl.full([], 0, tl.int32)
    for start in range(0, units, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        order = ordered(tl.load(scores + head * num_units + unit, mask=unit < units, other=0.0))
        above += tl.sum(tl.where(order > cut, _count_open(unit, size, first, end), 0))
    num_tied = tl.full([], 0, tl.int32)
    num_taken = tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        is_token = rank < length
        order = ordered(tl.load(scores + head * num_units + rank // size, mask=is_token, other=0.0))
        is_pinned = (rank < first) | (rank >= end)
        ties = (is_token & (order == cut) & ~is_pinned).to(tl.int32)
        is_early = (ties > 0) & (num_tied + tl.cumsum(ties, 0) <= wanted - above)
        takes = (is_token & (is_pinned | (order > cut) | is_early)).to(tl.int32)
        at = num_taken + tl.cumsum(takes, 0) - 1
        tl.store(chosen + head * most_chosen + at, rank, mask=takes > 0)
        num_tied += tl.sum(ties)
        num_taken += tl.sum(takes)


@triton.jit
def _count_open(unit, size, first, end):
    """Count each unit's tokens with ranks from `first` to before `end`."""
    return tl.maximum(tl.minimum((unit + 1) * size, end) - tl.maximum(unit * size, first), 0)
