"""Scores of tokens and the choice of the best: for stage 1 from the observation window, for stage 2 from logits."""

import torch
from torch import Tensor

from rocketkv.ops.terms import NO_TERMS, LogitTerms

BLOCK_ELEMENTS = 1 << 20  # the most float32 logits, 4 MiB, in memory at a time while a window is scored


def score_window(
    query: Tensor,
    keys: Tensor,
    *,
    lengths: Tensor,
    num_queries: Tensor,
    scale: float,
    terms: LogitTerms = NO_TERMS,
    by_peak: bool = False,
) -> Tensor:
    """Compute the attention that a row's last queries give to each of its tokens.

    Source: SnapKV as RocketKV uses it (section "SnapKV with GQA support"). The softmax runs over all tokens in float32
    and is causal inside the window, but for tokens `ahead`; its weights are summed over the window's queries and over
    the query heads of a KV head. With `by_peak`, which is our addition, the largest weight replaces the sum.

    Args:
        query: `[B, Hq, W, D]` float, right aligned.
        keys: `[B, Hkv, S, D]` float, left aligned, the window's own keys included.
        lengths: `[B, Hkv]` int64, the number of tokens in each row.
        num_queries: `[B]` int64, how many of the W columns, the last ones, are no padding.
        scale: the factor on the dot products.
        terms: the sinks, which take their part of a head's weights, the soft cap, and the last W columns of `ahead`.
        by_peak: True makes a token's score the largest weight that any query gives it, False the sum of the weights.

    Returns:
        `[B, Hkv, S]` float32, zero beyond the lengths.

    Reads `B * Hkv * S * D` elements of keys for each block of queries, which has `BLOCK_ELEMENTS` logits or fewer.
    """
    batch, num_heads, window, head_dim = query.shape
    num_kv_heads, num_tokens = keys.shape[1:3]
    grouped = query.reshape(batch, num_kv_heads, -1, window, head_dim)
    slots = torch.arange(num_tokens, device=keys.device)
    scores = torch.zeros(batch, num_kv_heads, num_tokens, dtype=torch.float32, device=keys.device)
    block = max(1, BLOCK_ELEMENTS // (batch * num_heads // num_kv_heads * num_tokens))
    for head in range(num_kv_heads):
        own = terms.of_group(head, num_kv_heads)
        transposed = keys[:, head].float().transpose(1, 2)  # [B, D, S]
        key_from_end = lengths[:, head, None] - 1 - slots  # [B, S]
        for start in range(0, window, block):
            queries = grouped[:, head, :, start : start + block].float()  # [B, G, w, D]
            query_from_end = window - 1 - torch.arange(start, start + queries.shape[2], device=keys.device)  # [w]
            last_from_end = query_from_end  # [w] | [B, w], what a query sees
            if terms.ahead is not None:
                last_from_end = query_from_end - terms.ahead[:, -window:][:, start : start + block]
            visible = key_from_end[:, None] >= last_from_end[..., None]  # [B, w, S]
            visible &= (query_from_end < num_queries[:, None])[..., None]
            logits = (queries.flatten(1, 2) @ transposed).reshape(*queries.shape[:3], num_tokens)  # [B, G, w, S]
            logits = own.cap(logits.mul_(scale)).masked_fill_(~visible[:, None], -torch.inf)
            shares = own.softmax(logits).nan_to_num_(0.0)  # a padded query sees no token, and its softmax is NaN
            if by_peak:
                scores[:, head] = scores[:, head].maximum(shares.amax((1, 2)))
            else:
                scores[:, head] += shares.sum((1, 2))
    return scores


def topk_mask(scores: Tensor, *, candidates: Tensor, num_tokens: Tensor) -> Tensor:
    """Mark the best of each row's first tokens; of equal scores the later token wins.

    Max-pooling gives neighbours equal scores, so ties are common. The rule gives a row the same tokens on every device,
    alone and in a batch. On a GPU the host does not wait for the device.

    Args:
        scores: `[B, Hkv, S]` float32, >= 0; a NaN is above all numbers.
        candidates: `[B, Hkv]` int64, how many tokens, the first ones, can be marked.
        num_tokens: `[B]` int64, how many tokens to mark; where a row has fewer candidates, all of them are marked.

    Returns:
        `[B, Hkv, S]` bool.
    """
    slots = torch.arange(scores.shape[2], dtype=torch.int32, device=scores.device)
    beyond = slots >= candidates[..., None].int()
    order = (scores.view(torch.int32) & 0x7FFFFFFF).masked_fill_(beyond, -1)  # bits have the order of their numbers
    counts = num_tokens[:, None].minimum(candidates)[..., None]
    cut = (_cut_on_cpu if order.device.type == "cpu" else _cut)(order, counts.clamp(min=1))
    above, equal = order > cut, order == cut
    ranks = equal.cumsum(2, dtype=torch.int32)  # of equal ones, from the first on
    return above | equal & (ranks > ranks[..., -1:] - (counts - above.sum(2, keepdim=True)))


def _cut(order: Tensor, ranks: Tensor) -> Tensor:
    """Return the number of `order`, `[B, Hkv, S]`, with this rank from the largest on, `[B, Hkv, 1]`, 1 to S."""
    return order.sort(descending=True).values.gather(2, ranks - 1)


def _cut_on_cpu(order: Tensor, ranks: Tensor) -> Tensor:
    """Do the same faster, where reading the ranks costs no wait."""
    rows, own = order.flatten(0, 1), ranks.flatten()
    cuts = torch.empty_like(own, dtype=order.dtype)
    for rank in {*own.tolist()}:
        same = own == rank
        cuts[same] = rows[same].kthvalue(rows.shape[1] + 1 - rank).values
    return cuts.view_as(ranks)


def score_tokens(logits: Tensor, lengths: Tensor, terms: LogitTerms = NO_TERMS) -> Tensor:
    """Turn logits into the score of each token: softmax per query head, mean over the heads of a KV head.

    Equal logits give equal scores. A token whose logit is NaN or infinite gets all of its head's score, so that the
    token is chosen and the output shows it.

    Args:
        logits: `[B, Hkv, G, S]` float, undefined beyond the lengths.
        lengths: `[B, Hkv]` int64, the number of tokens in each row.
        terms: the soft cap, which is laid on these logits, and the sinks, which take their part of a head's weights.

    Returns:
        `[B, Hkv, S]` float32, zero beyond the lengths.
    """
    beyond = torch.arange(logits.shape[3], device=logits.device) >= lengths[..., None]
    largest = torch.finfo(torch.float32).max
    logits = terms.cap(logits.float()).nan_to_num(largest, largest).masked_fill_(beyond[:, :, None], -torch.inf)
    scores, *others = terms.softmax(logits.flatten(1, 2)).view_as(logits).unbind(2)
    for other in others:  # torch's mean would add the heads of the last tokens in another order than the others
        scores = scores + other
    return scores / logits.shape[2]


def choose_tokens(scores: Tensor, *, lengths: Tensor, top_k: Tensor, sinks: Tensor, recents: Tensor) -> Tensor:
    """Choose the tokens to attend to: the pinned ones, then the best scores; of equal scores the earlier token wins.

    With the scores of pages the choice goes from the best page to the worst and takes each page's tokens in order.

    Args:
        scores: `[B, Hkv, S]` float, >= 0.
        lengths: `[B, Hkv]` int64, the number of tokens in each row.
        top_k: `[B]` int64, the number of tokens to choose, the pinned ones included.
        sinks: `[B]` int64, the number of first tokens that are pinned.
        recents: `[B]` int64, the number of last tokens that are pinned.

    Returns:
        Ranks, `[B, Hkv, max(top_k)]` int64; the choice of row b and head h is the first `min(top_k[b], lengths[b, h])`.
    """
    slots = torch.arange(scores.shape[2], device=scores.device)
    pinned = (slots < sinks[:, None, None]) | (slots >= lengths[..., None] - recents[:, None, None])
    scores = scores.masked_fill(pinned, torch.inf).masked_fill(slots >= lengths[..., None], -torch.inf)
    return scores.argsort(dim=2, descending=True, stable=True)[:, :, : int(top_k.max())]
