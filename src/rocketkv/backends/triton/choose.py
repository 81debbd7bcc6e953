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
    BLOCK: tl.constexpr, DIGIT: tl.constexpr
):  # fmt: skip
    """Update a head's spread, if there is one, with the new token; then choose the head's tokens. Grid: heads.

    The kernel reads the logits once and the scores at most `32 / DIGIT` times, mostly from the cache.
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
    first = tl.minimum(tl.load(sinks + row).to(tl.int32), length)
    end = length - tl.minimum(tl.load(recents + row).to(tl.int32), length - first)
    wanted = tl.load(top_k + row).to(tl.int32) - first - (length - end)  # tokens to choose by their scores
    if sink_logits is not None:
        sink_logits += head % HKV * G
    partials += head * num_parts * (2 * G)
    logits += head * G * num_units
    scores += head * num_units
    best, total = _merge_partials(partials, sink_logits, units, G, G_POW, PART)
    counts = _store_scores(scores, logits, best, total, units, num_units, size, first, end, G, G_POW, BLOCK, DIGIT)
    tl.debug_barrier()
    bound, shift, wanted = _find_cut(scores, counts, units, size, first, end, wanted, BLOCK, DIGIT)
    _store_chosen(chosen + head * most_chosen, scores, length, size, first, end, bound, shift, wanted, BLOCK)


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
def _merge_partials(partials, sink_logits, units, G: tl.constexpr, G_POW: tl.constexpr, PART: tl.constexpr):
    """Return each query head's largest logit, `[G_POW]`, and its sum of exponentials relative to that logit."""
    group = tl.arange(0, G_POW)
    best = tl.full([G_POW], -float("inf"), tl.float32)
    total = tl.zeros([G_POW], tl.float32)
    if sink_logits is not None:
        best, total = tl.load(sink_logits + group, mask=group < G, other=0.0), total + 1.0
    parts = (units + PART - 1) // PART
    for start in range(0, parts, PART):
        part = start + tl.arange(0, PART)
        is_part = (group[:, None] < G) & (part < parts)[None, :]
        at = partials + part[None, :] * (2 * G) + group[:, None]
        part_best = tl.load(at, mask=is_part, other=-float("inf"))
        part_total = tl.load(at + G, mask=is_part, other=0.0)
        higher = tl.maximum(best, tl.max(part_best, 1))
        total = total * tl.exp(best - higher) + tl.sum(part_total * tl.exp(part_best - higher[:, None]), 1)
        best = higher
    return best, total


@triton.jit
def _store_scores(
    scores, logits, best, total, units, num_units, size, first, end, G: tl.constexpr, G_POW: tl.constexpr,
    BLOCK: tl.constexpr, DIGIT: tl.constexpr
):  # fmt: skip
    """Store the scores of a head's units: the softmax over all tokens and the sink, as a mean over the group.

    Returns what `_count_digits` counts by the highest digit.
    """
    group = tl.arange(0, G_POW)
    counts = tl.zeros([2**DIGIT], tl.int32)
    for start in range(0, units, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        mask = (group[:, None] < G) & (unit < units)[None, :]
        logit = tl.load(logits + group[:, None] * num_units + unit[None, :], mask=mask, other=0.0)
        shares = tl.where(mask, tl.exp(logit - best[:, None]) / (total * G)[:, None], 0.0)
        score = tl.sum(shares, 0)
        tl.store(scores + unit, score, mask=unit < units)
        counts += _count_digits(ordered(score), 0, 32 - DIGIT, unit, size, first, end, DIGIT)
    return counts


@triton.jit
def _find_cut(scores, counts, units, size, first, end, wanted, BLOCK: tl.constexpr, DIGIT: tl.constexpr):
    """Find the cut, the score of the last token wanted as `ordered`, one digit of `DIGIT` bits a walk over the scores.

    Open tokens have ranks from `first` to before `end` and are chosen by their scores alone. `counts` has those of
    wholly open units by their highest digit. The search ends early once all open tokens that share the digits found so
    far are wanted.

    Returns:
        The digits of the cut that were found, the number of bits below them, and how many of the open tokens that share
        these digits are wanted.
    """
    edge, edge_tokens = _edges(size, first, end)
    edge_order = ordered(tl.load(scores + edge, mask=edge < units, other=0.0))
    cut = tl.full([], 0, tl.uint32)
    shift = 32 - DIGIT
    counts += _count_edges(edge_order, edge_tokens, cut, shift, DIGIT)
    digit, wanted, sharing = _find_digit(counts, wanted, DIGIT)
    cut |= digit << shift
    while (shift > 0) & (sharing != wanted):
        shift -= DIGIT
        counts = _count_edges(edge_order, edge_tokens, cut, shift, DIGIT)
        for start in range(0, units, BLOCK):
            unit = start + tl.arange(0, BLOCK)
            order = ordered(tl.load(scores + unit, mask=unit < units, other=0.0))
            counts += _count_digits(order, cut, shift, unit, size, first, end, DIGIT)
        digit, wanted, sharing = _find_digit(counts, wanted, DIGIT)
        cut |= digit << shift
    return cut >> shift, shift, wanted


@triton.jit
def _find_digit(counts, wanted, DIGIT: tl.constexpr):
    """Return the digit of the last token wanted, how many tokens with it are wanted, and how many there are."""
    digits = tl.arange(0, 2**DIGIT)
    from_digit = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((from_digit >= wanted).to(tl.int32)) - 1
    sharing = tl.sum(tl.where(digits == digit, counts, 0))
    above = tl.sum(tl.where(digits > digit, counts, 0))
    return digit.to(tl.uint32), wanted - above, sharing


@triton.jit
def _count_digits(order, cut, shift, unit, size, first, end, DIGIT: tl.constexpr):
    """Count the tokens of wholly open units by the digit of their score that begins at bit `shift`: `[2**DIGIT]` int32.

    Only those count whose score has the bits of the cut above this digit.
    """
    is_counted = (_count_open(unit, size, first, end) == size) & ((order ^ cut) >> shift >> DIGIT == 0)
    return tl.histogram((order >> shift & (2**DIGIT - 1)).to(tl.int32), 2**DIGIT, mask=is_counted) * size


@triton.jit
def _edges(size, first, end):
    """Return the two units that may be open in part, `[2]`, and how many open tokens each has if it is."""
    is_last = tl.arange(0, 2) > 0
    edge = tl.where(is_last, end, first) // size
    tokens = _count_open(edge, size, first, end)
    is_partial = (tokens < size) & (is_last | (first // size < end // size))  # a unit counts once
    return edge, tl.where(is_partial, tokens, 0)


@triton.jit
def _count_edges(order, tokens, cut, shift, DIGIT: tl.constexpr):
    """Count the tokens of `_edges` by digit as `_count_digits` does."""
    tokens = tl.where((order ^ cut) >> shift >> DIGIT == 0, tokens, 0)
    has_digit = (order >> shift & (2**DIGIT - 1))[None, :] == tl.arange(0, 2**DIGIT)[:, None]
    return tl.sum(tl.where(has_digit, tokens[None, :], 0), 1)


@triton.jit
def _store_chosen(chosen, scores, length, size, first, end, bound, shift, wanted, BLOCK: tl.constexpr):
    """Store the ranks of the pinned tokens, of the open ones with a score above the bound, and of `wanted` at it.

    Scores are compared without their last `shift` bits. Of the tokens at the bound the first ones are taken.
    """
    num_sure = tl.full([], 0, tl.int32)
    num_tied = tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        is_token = rank < length
        is_open = (rank >= first) & (rank < end)
        score = ordered(tl.load(scores + rank // size, mask=is_token, other=0.0)) >> shift
        is_sure = is_token & ((score > bound) | ~is_open)
        is_tied = is_open & (score == bound)
        sure_to_here = num_sure + tl.cumsum(is_sure.to(tl.int32), 0)
        tied_to_here = num_tied + tl.cumsum(is_tied.to(tl.int32), 0)
        takes = is_sure | (is_tied & (tied_to_here <= wanted))
        tl.store(chosen + sure_to_here + tl.minimum(tied_to_here, wanted) - 1, rank, mask=takes)
        num_sure += tl.sum(is_sure.to(tl.int32))
        num_tied += tl.sum(is_tied.to(tl.int32))


@triton.jit
def _count_open(unit, size, first, end):
    """Count each unit's tokens with ranks from `first` to before `end`."""
    return tl.maximum(tl.minimum((unit + 1) * size, end) - tl.maximum(unit * size, first), 0)
