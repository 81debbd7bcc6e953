"""From logits to decisions: attention mass of the observation window, and the best tokens of a row."""

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20  # float32 logits held at once while scoring a window: 4 MiB


def score_window(
    query: Tensor, keys: Tensor, *, lengths: Tensor, num_queries: Tensor, scale: float, by_peak: bool = False
) -> Tensor:
    """Attention that a row's last queries give to each of its tokens.

    SnapKV as RocketKV uses it (section "SnapKV with GQA support"): softmax over all tokens in float32, causal inside
    the window, summed over the window's queries and over the query heads of a KV head; with `by_peak`, the largest
    instead of the sum.

    Args:
        query: `[B, Hq, W, D]` float, right aligned.
        keys: `[B, Hkv, S, D]` float, left aligned, the window's own keys included.
        lengths: `[B, Hkv]` int64, tokens in each row.
        num_queries: `[B]` int64, how many of the W columns count, the last ones.
        scale: factor on the dot products.
        by_peak: whether a token's score is the most that any query gives it, not what all give it together.

    Returns:
        `[B, Hkv, S]` float32, zero beyond the lengths.

    Reads `B * Hkv * S * D` elements of keys for each block of queries; holds `BLOCK_ELEMENTS` logits at a time.
    """
    batch, num_heads, window, head_dim = query.shape
    num_kv_heads, num_tokens = keys.shape[1:3]
    grouped = query.reshape(batch, num_kv_heads, -1, window, head_dim)
    slots = torch.arange(num_tokens, device=keys.device)
    scores = torch.zeros(batch, num_kv_heads, num_tokens, dtype=torch.float32, device=keys.device)
    block = max(1, BLOCK_ELEMENTS // (batch * num_heads // num_kv_heads * num_tokens))
    for head in range(num_kv_heads):
        transposed = keys[:, head].float().transpose(1, 2)  # [B, D, S]
        key_from_end = lengths[:, head, None] - 1 - slots  # [B, S]
        for start in range(0, window, block):
            queries = grouped[:, head, :, start : start + block].float()  # [B, G, w, D]
            query_from_end = window - 1 - torch.arange(start, start + queries.shape[2], device=keys.device)  # [w]
            visible = key_from_end[:, None] >= query_from_end[:, None]  # [B, w, S]
            visible &= (query_from_end < num_queries[:, None])[..., None]
            logits = (queries.flatten(1, 2) @ transposed).reshape(*queries.shape[:3], num_tokens)  # [B, G, w, S]
            logits.mul_(scale).masked_fill_(~visible[:, None], -torch.inf)
            shares = logits.softmax(-1).nan_to_num_(0.0)  # NaN: a padded query sees nothing
            if by_peak:
                scores[:, head] = scores[:, head].maximum(shares.amax((1, 2)))
            else:
                scores[:, head] += shares.sum((1, 2))
    return scores


def topk_mask(scores: Tensor, *, candidates: Tensor, num_tokens: Tensor) -> Tensor:
    """Mark the best of each row's first tokens; of equal scores those that `torch.topk` takes.

    Max-pooling makes plateaus, so ties are common; they are broken as in the published results, row by row, and thus
    in a batch as alone.

    Args:
        scores: `[B, Hkv, S]` float.
        candidates: `[B, Hkv]` int64, how many tokens compete, the first ones.
        num_tokens: `[B]` int64, how many to mark; all candidates if they are fewer.

    Returns:
        `[B, Hkv, S]` bool.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, (ends, count) in enumerate(zip(candidates.tolist(), num_tokens.tolist(), strict=True)):
        for head, end in enumerate(ends):
            best = scores[row, head, :end].topk(min(count, end), sorted=False).indices
            mask[row, head, best] = True
    return mask


def score_tokens(logits: Tensor, lengths: Tensor) -> Tensor:
    """Turn logits into the score of each token: softmax per query head, mean over the heads of a KV head.

    Equal logits give equal scores. A logit that is no number, or infinite, has all of its head's score, so that its
    token is chosen and shows in the output.

    Args:
        logits: `[B, Hkv, G, S]` float; anything beyond the lengths.
        lengths: `[B, Hkv]` int64.

    Returns:
        `[B, Hkv, S]` float32, zero beyond the lengths.
    """
    beyond = torch.arange(logits.shape[3], device=logits.device) >= lengths[..., None]
    largest = torch.finfo(torch.float32).max
    logits = logits.float().nan_to_num(largest, largest).masked_fill_(beyond[:, :, None], -torch.inf)
    scores, *others = logits.softmax(-1).unbind(2)
    for other in others:  # head by head: torch's mean adds in another order where a row ends than before
        scores = scores + other
    return scores / logits.shape[2]


def choose_tokens(scores: Tensor, *, lengths: Tensor, top_k: Tensor, sinks: Tensor, recents: Tensor) -> Tensor:
    """Choose the tokens to attend to: the pinned ones, then the best scores; of equal scores the earlier token wins.

    With page scores this walks pages from best to worst and takes their tokens in order.

    Args:
        scores: `[B, Hkv, S]` float, >= 0.
        lengths: `[B, Hkv]` int64, tokens in each row.
        top_k: `[B]` int64, tokens to choose, the pinned ones included.
        sinks: `[B]` int64, first tokens pinned.
        recents: `[B]` int64, last tokens pinned.

    Returns:
        `[B, Hkv, max(top_k)]` int64 slots; row b's choice is its first `min(top_k[b], lengths[b, h])`.
    """
    slots = torch.arange(scores.shape[2], device=scores.device)
    pinned = (slots < sinks[:, None, None]) | (slots >= lengths[..., None] - recents[:, None, None])
    scores = scores.masked_fill(pinned, torch.inf).masked_fill(slots >= lengths[..., None], -torch.inf)
    return scores.argsort(dim=2, descending=True, stable=True)[:, :, : int(top_k.max())]
