"""The kernels of stage 1's scores, as `score_window` in ops/scores.py specifies them.

Keys are `[B, Hkv, S, D]`, in which rows and heads may have any stride. The first launch passes `partials` to the
second, `[B, Hkv, parts, 2, G * W]` float32: each query's largest logit in a part, and its sum of exponentials relative
to that logit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rocketkv.backends.triton import sizes
from rocketkv.backends.triton.common import capped, product
from rocketkv.backends.triton.launch import Launch, key_arguments
from rocketkv.ops import LogitTerms


@triton.jit(do_not_specialize=["num_parts", "part_size", "batch_stride", "head_stride"])
def sum_window_kernel(
    query, keys, lengths, num_queries, partials, scale, softcap, num_parts, part_size, batch_stride, head_stride,
    HKV: tl.constexpr, G: tl.constexpr, W: tl.constexpr, D: tl.constexpr, R_PAD: tl.constexpr, D_PAD: tl.constexpr,
    TILE: tl.constexpr
):  # fmt: skip
    """Store each query's largest logit in a part of a head's tokens, and its sum of exponentials relative to that.

    Grid: heads, parts, groups of `R_PAD` queries. The kernel reads the part's keys.
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
            query, keys, head, length, seeing, first_row, start, scale, softcap, ROWS, W, D, R_PAD, D_PAD, TILE
        )
        higher = tl.maximum(best, tl.max(logits, 1))
        safe = tl.where(higher > -float("inf"), higher, 0.0)  # a query may have seen no token yet
        total = total * tl.exp(best - safe) + tl.sum(tl.exp(logits - safe[:, None]), 1)
        best = higher
    row = first_row + tl.arange(0, R_PAD)
    at = partials + (head * num_parts + part) * 2 * ROWS + row
    tl.store(at, best, mask=row < ROWS)
    tl.store(at + ROWS, total, mask=row < ROWS)


@triton.jit(do_not_specialize=["num_parts", "part_size", "num_tokens", "batch_stride", "head_stride"])
def score_window_kernel(
    query, keys, lengths, num_queries, partials, scores, scale, softcap, sink_logits, num_parts, part_size, num_tokens,
    batch_stride, head_stride, BY_PEAK: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    D: tl.constexpr, R_PAD: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Store the sum or the largest of the weights that `R_PAD` queries give to each token of a part.

    Grid: heads, parts, groups of `R_PAD` queries. Reads the part's keys.
    """
    head, part, first_row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * R_PAD
    ROWS: tl.constexpr = G * W
    length, seeing = tl.load(lengths + head).to(tl.int32), tl.load(num_queries + head // HKV).to(tl.int32)
    keys += head // HKV * batch_stride + head % HKV * head_stride
    row = first_row + tl.arange(0, R_PAD)
    best = tl.full([R_PAD], -float("inf"), tl.float32)
    total = tl.zeros([R_PAD], tl.float32)
    if sink_logits is not None:
        best = tl.load(sink_logits + head % HKV * G + row // W, mask=row < ROWS, other=0.0)
        total += 1.0
    for other in range(num_parts):
        at = partials + (head * num_parts + other) * 2 * ROWS + row
        part_best = tl.load(at, mask=row < ROWS, other=-float("inf"))
        part_total = tl.load(at + ROWS, mask=row < ROWS, other=0.0)
        higher = tl.maximum(best, part_best)
        safe = tl.where(higher > -float("inf"), higher, 0.0)
        total = total * tl.exp(best - safe) + part_total * tl.exp(part_best - safe)
        best = higher
    safe = tl.where(best > -float("inf"), best, 0.0)
    share = tl.where(total > 0, 1.0 / total, 0.0)  # a padded query sees no token; the weights of NaN count as 0
    scores += (head * tl.num_programs(2) + tl.program_id(2)) * num_tokens
    begin = part * part_size
    end = tl.minimum(begin + part_size, num_tokens)
    for start in range(begin, end, TILE):
        logits = _window_logits(
            query, keys, head, length, seeing, first_row, start, scale, softcap, ROWS, W, D, R_PAD, D_PAD, TILE
        )
        mass = tl.where(share[:, None] > 0, tl.exp(logits - safe[:, None]) * share[:, None], 0.0)
        token = start + tl.arange(0, TILE)
        tl.store(scores + token, tl.max(mass, 0) if BY_PEAK else tl.sum(mass, 0), mask=token < end)


def score_window(
    query: Tensor, keys: Tensor, *, lengths: Tensor, num_queries: Tensor, scale: float, by_peak: bool, terms: LogitTerms
) -> Tensor:
    """Compute the scores in two launches, in which a program has one tile's logits; see `score_window` in ops."""
    batch, num_heads, window, head_dim = query.shape
    num_kv_heads, num_tokens = keys.shape[1:3]
    group = num_heads // num_kv_heads
    tile = min(sizes.PART, sizes.TILE_BYTES // (sizes.padded(head_dim) * keys.element_size()))
    part_size = max(tile, sizes.LEAST_WINDOW_PART // tile * tile)
    num_parts = -(-num_tokens // part_size)
    rows_at_once = min(tile, sizes.padded(group * window))
    row_groups = -(-group * window // rows_at_once)
    scores = keys.new_empty(batch, num_kv_heads, row_groups, num_tokens, dtype=torch.float32)
    arguments = key_arguments(keys) | {
        "query": query.contiguous(),
        "lengths": lengths,
        "num_queries": num_queries,
        "partials": keys.new_empty(batch * num_kv_heads, num_parts, 2, group * window, dtype=torch.float32),
        "scores": scores,
        "scale": scale,
        "softcap": terms.softcap,
        "sink_logits": terms.sink_logits,
        "num_parts": num_parts,
        "part_size": part_size,
        "num_tokens": num_tokens,
        "BY_PEAK": by_peak,
        "G": group,
        "W": window,
        "R_PAD": rows_at_once,
        "TILE": tile,
    }
    for kernel in (sum_window_kernel, score_window_kernel):
        Launch(kernel, (batch * num_kv_heads, num_parts, row_groups), arguments, device=keys.device)()
    return scores.amax(2) if by_peak else scores.sum(2)


@triton.jit
def _window_logits(
    query, keys, head, length, num_queries, first_row, start, scale, softcap, ROWS: tl.constexpr, W: tl.constexpr,
    D: tl.constexpr, R_PAD: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Return the logits, `[R_PAD, TILE]`, of some queries for the tokens from `start` on; -inf for unseen tokens."""
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
    logits = product(q, tl.trans(k)) * scale
    if softcap is not None:
        logits = capped(logits, softcap)
    return tl.where(is_visible, logits, -float("inf"))
