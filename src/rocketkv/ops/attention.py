"""Exact attention: causal and dense over all tokens, or over chosen tokens only."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rocketkv.ops.gather import take_tokens
from rocketkv.ops.memory import on_device
from rocketkv.ops.terms import NO_TERMS, LogitTerms

QUERY_BLOCK = 512  # query tokens per masked block: a mask is never larger than [B, H, QUERY_BLOCK, S]
BLOCK_LOGITS = 1 << 25  # the most float32 logits, 128 MiB, in memory at a time where there are terms


def prefill_densely(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lengths: Tensor | None = None,
    num_queries: Tensor | None = None,
    scale: float,
    terms: LogitTerms = NO_TERMS,
) -> Tensor:
    """Compute the causal attention of each row's last tokens to all tokens of the row, and to those `ahead` of them.

    Distances are counted from the end of each row, so earlier turns, left padding and ragged heads are one case.

    Args:
        query: `[B, Hq, T, D]` float, right aligned: a row's last column is its last token.
        keys: `[B, Hkv, S, D]` float, left aligned, the T newest tokens included.
        values: like `keys`.
        lengths: `[B, Hkv]` int64 on the host, the number of tokens in each row; None means all S, and T must equal S.
        num_queries: `[B]` int64, how many of the T query columns, the last ones, are no padding; None means all.
        scale: the factor on the dot products.
        terms: the sinks, the soft cap, and how far queries see ahead.

    Returns:
        `[B, Hq, T, D]` in the dtype of `query`; zero in padded columns.

    Reads `2 * B * Hkv * S * D` elements of keys and values for each block of `QUERY_BLOCK` query tokens; with terms,
    for each block that has `BLOCK_LOGITS` logits or fewer.
    """
    num_tokens, block = query.shape[2], QUERY_BLOCK
    if not terms.are_none:
        block = max(1, min(block, BLOCK_LOGITS // (query.shape[0] * query.shape[1] * keys.shape[2])))
    if lengths is None and not (terms.are_none and terms.ahead is None):
        lengths = torch.full(keys.shape[:2], keys.shape[2], device="cpu")
    if lengths is None:
        return scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
        )
    is_full, is_shared = bool((lengths == keys.shape[2]).all()), bool((lengths == lengths[:, :1]).all())
    lengths = on_device(lengths, keys.device)
    if not is_full:
        keys, values = _zero_beyond(keys, lengths), _zero_beyond(values, lengths)
    group = query.shape[1] // keys.shape[1]
    lengths = lengths[:, :1] if is_shared else lengths.repeat_interleave(group, dim=1)  # one mask for all heads
    slots = torch.arange(keys.shape[2], device=query.device)
    key_from_end = lengths[..., None] - 1 - slots  # [B, 1 | Hq, S]; negative where there is no token
    last_from_end = num_tokens - 1 - torch.arange(num_tokens, device=query.device)  # [T] | [B, 1, T], what a query sees
    furthest = 0
    if terms.ahead is not None:
        last_from_end, furthest = (last_from_end - terms.ahead)[:, None], int(terms.ahead.max())
    output = torch.empty_like(query)
    for start in range(0, num_tokens, block):
        stop = min(start + block, num_tokens)
        seen = keys.shape[2] - max(0, num_tokens - stop - furthest)  # no query of this block sees a later slot
        output[:, :, start:stop] = _attend(
            query[:, :, start:stop],
            keys[:, :, :seen],
            values[:, :, :seen],
            key_from_end[:, :, None, :seen] >= last_from_end[..., start:stop, None],
            scale,
            terms,
        )
    if num_queries is not None:
        from_end = num_tokens - 1 - torch.arange(num_tokens, device=query.device)
        output = output.masked_fill((from_end >= num_queries[:, None])[:, None, :, None], 0.0)
    return output


def decode_sparsely(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    slots: Tensor,
    counts: Tensor,
    scale: float,
    terms: LogitTerms = NO_TERMS,
) -> Tensor:
    """Compute the exact attention of one token per row to the chosen tokens only.

    Source: RocketKV, section "Hybrid Sparse Attention", step 3.

    Args:
        query: `[B, Hq, 1, D]` float.
        keys: `[B, Hkv, S, D]` float.
        values: like `keys`.
        slots: `[B, Hkv, K]` int64, the slots of the chosen tokens; all query heads of a KV head share them.
        counts: `[B, Hkv]` int64, 1 to K; only the first `counts` of the K slots are chosen.
        scale: the factor on the dot products.
        terms: the sinks, which share in the softmax as they do where all tokens are attended to, and the soft cap.

    Returns:
        `[B, Hq, 1, D]` in the dtype of `query`.

    Reads `2 * B * Hkv * K * D` elements; dense attention reads `2 * B * Hkv * S * D`.
    """
    is_chosen = torch.arange(slots.shape[2], device=slots.device) < counts[..., None]  # [B, Hkv, K]
    slots = slots.where(is_chosen, slots[..., :1])  # slots beyond the counts may point to undefined memory
    keys, values = take_tokens(keys, slots), take_tokens(values, slots)
    return _attend_together(query, keys, values, is_chosen, scale, terms)


def decode_densely(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lengths: Tensor | None,
    scale: float,
    terms: LogitTerms = NO_TERMS,
) -> Tensor:
    """Compute the exact attention of one token per row to every token of the row.

    Args:
        query: `[B, Hq, 1, D]` float.
        keys: `[B, Hkv, S, D]` float.
        values: like `keys`.
        lengths: `[B, Hkv]` int64, the number of tokens in each row; None means all S.
        scale: the factor on the dot products.
        terms: the sinks and the soft cap.

    Returns:
        `[B, Hq, 1, D]` in the dtype of `query`.

    Reads `2 * B * Hkv * S * D` elements, once for all query heads of a KV head.
    """
    mask = None
    if lengths is not None:
        keys, values = _zero_beyond(keys, lengths), _zero_beyond(values, lengths)
        mask = torch.arange(keys.shape[2], device=keys.device) < lengths[..., None]
    return _attend_together(query, keys, values, mask, scale, terms)


def _attend_together(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, terms: LogitTerms
) -> Tensor:
    """Attend `[B, Hq, 1, D]` where `mask`, `[B, Hkv, S]` bool, is True for all query heads of a KV head."""
    if terms.are_none:
        grouped = query.reshape(keys.shape[0], keys.shape[1], -1, query.shape[3])  # [B, Hkv, G, D]
        own = None if mask is None else mask[:, :, None]
        return scaled_dot_product_attention(grouped, keys, values, attn_mask=own, scale=scale).reshape(query.shape)
    if mask is not None:
        mask = mask.repeat_interleave(query.shape[1] // keys.shape[1], 1)[:, :, None]
    return _attend(query, keys, values, mask, scale, terms)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, terms: LogitTerms
) -> Tensor:
    """Attend `[B, Hq, T, D]` where `mask`, `[B, 1 | Hq, T, S]` bool, is True; a row that sees nothing is undefined."""
    if terms.are_none:
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
        )
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(*keys.shape[:2], -1, query.shape[3])  # [B, Hkv, G * T, D]
    logits = terms.cap((grouped @ keys.to(wide).transpose(2, 3)) * scale).reshape(*query.shape[:3], -1)
    weights = terms.softmax(logits if mask is None else logits.masked_fill(~mask, -torch.inf))
    return (weights.reshape(*grouped.shape[:3], -1) @ values.to(wide)).reshape(query.shape).to(query.dtype)


def _zero_beyond(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Zero the tokens beyond `[B, Hkv]` lengths: undefined memory may contain NaN, which no mask removes."""
    beyond = torch.arange(tokens.shape[2], device=tokens.device) >= lengths[..., None]
    return tokens.masked_fill(beyond[..., None], 0.0)
