"""The last launch of a decode step: attend to the chosen tokens in pieces, merge the pieces, count the new token.

step.py describes the tensors.
"""

import triton
import triton.language as tl

from rocketkv.backends.triton.common import UNSPECIALIZED, capped, load_query, product, rounded
from rocketkv.backends.triton.int8 import load_rows, num_steps
from rocketkv.backends.triton.lowbit import GROUP, HALF


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend(
    query, output, report, keys, values, exponents, positions, lengths, archive_lengths, seen, page_size, num_channels,
    top_k, dense_lengths, chosen, pieces, states, pieces_done, read_bytes, scale, softcap, sink_logits, token_capacity,
    position_capacity, num_pieces, most_chosen, SCORING: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, NUM_ROWS: tl.constexpr, G_PAD: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr,
    WEIGHTED: tl.constexpr
):  # fmt: skip
    """Attend to the chosen tokens of a head, or to all, in pieces that the last program merges. Grid: heads, pieces.

    The kernel reads `2 * D` elements for each token attended to, or their codes and exponents.
    """
    head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = head // HKV
    length = tl.load(lengths + head) + 1
    selects = False
    count = length  # the number of tokens attended to
    if SCORING != "dense":
        selects = length > tl.load(dense_lengths + row)
        count = tl.where(selects, tl.load(top_k + row), length)
    piece_size = ((count + num_pieces - 1) // num_pieces + TILE - 1) // TILE * TILE
    used_pieces = (count + piece_size - 1) // piece_size

    channel, group, lane = tl.arange(0, D_PAD), tl.arange(0, G_PAD), tl.arange(0, TILE)
    is_channel, is_head = channel < D, group < G
    q = load_query(query, head, 0, G, D, G_PAD, D_PAD)
    best = tl.full([G_PAD], -float("inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    sums = tl.zeros([G_PAD, D_PAD], tl.float32)
    STEPS: tl.constexpr = num_steps(D)
    begin = piece * piece_size
    for start in range(begin, tl.minimum(begin + piece_size, count), TILE):
        at = start + lane
        is_token = at < count
        rank = at
        if SCORING != "dense":
            is_chosen = at < tl.where(selects, count, 0)
            rank = tl.where(selects, tl.load(chosen + head * most_chosen + at, mask=is_chosen, other=0), at)
        slot = rank
        if archive_lengths is not None:
            slot = tl.load(positions + head * position_capacity + rank, mask=is_token, other=0).to(tl.int64)
        if report is not None:
            tl.store(report + head * position_capacity + at, rank.to(tl.int32), mask=is_token)
        slot += head * token_capacity
        offsets = (slot * D)[:, None] + channel[None, :]
        k = load_rows(keys, offsets, exponents, slot, is_token, 0, D, D_PAD, q.dtype)
        v = load_rows(values, offsets, exponents, slot, is_token, STEPS, D, D_PAD, q.dtype)
        logits = product(q, tl.trans(k)) * scale
        if softcap is not None:
            logits = capped(logits, softcap)
        logits = tl.where(is_token[None, :], logits, -float("inf"))
        higher = tl.maximum(best, tl.max(logits, 1))
        weights = rounded(tl.exp(logits - higher[:, None]), v.dtype)
        shrunk = tl.exp(best - higher)
        total = total * shrunk + tl.sum(weights.to(tl.float32), 1)  # the sum counts the weights as rounded
        sums = sums * shrunk[:, None] + product(weights, v)
        best = higher

    own = head * num_pieces + piece
    is_own = group < tl.where(piece < used_pieces, G, 0)
    tl.store(
        pieces + (own * G + group[:, None]) * D + channel[None, :], sums, mask=is_own[:, None] & is_channel[None, :]
    )
    tl.store(states + own * (2 * G) + group, best, mask=is_own)
    tl.store(states + own * (2 * G) + G + group, total, mask=is_own)
    tl.debug_barrier()
    if tl.atomic_add(pieces_done + head, 1, sem="acq_rel") < num_pieces - 1:  # the last program goes on
        return

    if sink_logits is not None:
        sink_logits += head % HKV * G
    mean = _merge(pieces, states, sink_logits, head, num_pieces, used_pieces, G, D, G_PAD, D_PAD)
    mean = rounded(mean, output.dtype.element_ty)
    is_out = is_head[:, None] & is_channel[None, :]
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


@triton.jit
def _merge(
    pieces, states, sink_logits, head, num_pieces, used_pieces, G: tl.constexpr, D: tl.constexpr, G_PAD: tl.constexpr,
    D_PAD: tl.constexpr
):  # fmt: skip
    """Merge the pieces of a head and its sinks into the weighted mean of its values, `[G_PAD, D_PAD]` float32."""
    channel, group = tl.arange(0, D_PAD), tl.arange(0, G_PAD)
    is_head = group < G
    is_out = is_head[:, None] & (channel < D)[None, :]
    best = tl.full([G_PAD], -float("inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    sums = tl.zeros([G_PAD, D_PAD], tl.float32)
    if sink_logits is not None:
        best, total = tl.load(sink_logits + group, mask=is_head, other=0.0), total + 1.0
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
    return sums / total[:, None]


@triton.jit
def _scored_bytes(
    length, size, num_channels, NUM_ROWS: tl.constexpr, D: tl.constexpr, SCORING: tl.constexpr, BYTES: tl.constexpr,
    WEIGHTED: tl.constexpr
):  # fmt: skip
    """Count the bytes that the scoring of a head has read, `BYTES` for each element."""
    pages = (length + size - 1) // size
    SPREAD_BYTES: tl.constexpr = 4 * D if WEIGHTED else 0
    if SCORING == "lowbit":
        return num_channels * (length // GROUP * (HALF + 2 * BYTES) + length % GROUP * BYTES) + SPREAD_BYTES
    if SCORING == "pages":
        return pages * num_channels * BYTES + SPREAD_BYTES
    if SCORING == "bounds":
        return pages * NUM_ROWS * BYTES
    return length * D * BYTES
