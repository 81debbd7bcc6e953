"""Page bounds, the index of stage 2: what the keys of a page can be at most and at least, channel by channel.

Bounds are `[B, Hkv, 2 * D, P]`: minima of all channels, then maxima, channel-major so that unread channels are skipped.
Where every page holds one token, minima and maxima are the keys themselves and stored once: `[B, Hkv, D, P]`.
"""

import torch
from torch import Tensor


def fold_into_pages(bounds: Tensor, keys: Tensor, *, slots: Tensor, lengths: Tensor, page_size: Tensor) -> None:
    """Let the bounds of each key's page take in the key, in place.

    Args:
        bounds: `[B, Hkv, D or 2 * D, P]` float; of a page without tokens: +inf and -inf.
        keys: `[B, Hkv, T, D]` in the dtype of `bounds`.
        slots: `[B, Hkv, T]` int64, where the keys stand in their rows.
        lengths: `[B, Hkv]` int64; keys at slots beyond are left out.
        page_size: `[B]` int64, tokens per page.

    Reads `B * Hkv * T * D` elements.
    """
    head_dim = keys.shape[3]
    beyond = (slots >= lengths[..., None])[:, :, None]  # [B, Hkv, 1, T]
    columns = keys.transpose(2, 3)  # [B, Hkv, D, T]
    page = (slots // page_size[:, None, None])[:, :, None].expand_as(columns)
    bounds[:, :, -head_dim:].scatter_reduce_(3, page, columns.masked_fill(beyond, -torch.inf), "amax")
    if bounds.shape[2] > head_dim:
        bounds[:, :, :head_dim].scatter_reduce_(3, page, columns.masked_fill(beyond, torch.inf), "amin")


def hybrid_logits(
    query: Tensor, bounds: Tensor, *, page_size: Tensor, num_tokens: int, num_channels: Tensor, scale: float
) -> Tensor:
    """Approximate the logit of every token by its page, along the query's largest channels only.

    RocketKV, section "Hybrid Sparse Attention"; the temperature is SparQ's (section "SparQ Attention", step 1).

    Args:
        query: `[B, Hkv, G, D]` float, the query heads of each KV head.
        bounds: `[B, Hkv, D or 2 * D, P]` float.
        page_size: `[B]` int64, tokens per page.
        num_tokens: S, tokens to give a logit to.
        num_channels: `[B]` int64, channels to read, 1 to D.
        scale: factor on the dot products.

    Returns:
        `[B, Hkv, G, S]` float32, undefined beyond a row's length.

    Reads `num_channels` elements for each page and KV head; dense attention reads `2 * D` for each token.
    """
    query = query.float()
    head_dim = query.shape[3]
    channels = query.abs().mean(2).topk(int(num_channels.max()), dim=2).indices  # [B, Hkv, R]
    read = torch.arange(channels.shape[2], device=query.device) < num_channels[:, None]  # [B, R]
    chosen = query.gather(3, channels[:, :, None].expand(-1, -1, query.shape[2], -1)) * read[:, None, None]
    if bounds.shape[2] > head_dim:  # the maximum where the heads together are positive, otherwise the minimum
        channels = channels + head_dim * (query.sum(2).gather(2, channels) > 0)
    bound = bounds.gather(2, channels[..., None].expand(-1, -1, -1, bounds.shape[3])).float()  # [B, Hkv, R, P]
    share = chosen.abs().sum(3, keepdim=True) / query.abs().sum(3, keepdim=True).clamp_min(1e-30)
    return _of_tokens((chosen @ bound) * (scale / share.sqrt().clamp_min(1e-15)), page_size, num_tokens)


def bound_logits(query: Tensor, bounds: Tensor, *, page_size: Tensor, num_tokens: int, scale: float) -> Tensor:
    """Bound the logit of every token from above by its page, along all channels, each query head for itself.

    Quest (arXiv:2406.10774), section "Dynamically Estimating Token Criticality".

    Args:
        query: `[B, Hkv, G, D]` float, the query heads of each KV head.
        bounds: `[B, Hkv, D or 2 * D, P]` float.
        page_size: `[B]` int64, tokens per page.
        num_tokens: S, tokens to give a logit to.
        scale: factor on the dot products, > 0.

    Returns:
        `[B, Hkv, G, S]` float32, undefined beyond a row's length.

    Reads `2 * D` elements for each page and KV head (D where bounds are stored once); dense attention reads `2 * D` for
    each token.
    """
    query = query.float()
    if bounds.shape[2] > query.shape[3]:
        query = torch.cat([query.clamp_max(0.0), query.clamp_min(0.0)], dim=3)
    return _of_tokens((query @ bounds.float()) * scale, page_size, num_tokens)


def _of_tokens(page_logits: Tensor, page_size: Tensor, num_tokens: int) -> Tensor:
    """Give each of `num_tokens` tokens the logit of its page: `[B, Hkv, G, P]` to `[B, Hkv, G, S]`."""
    page = torch.arange(num_tokens, device=page_logits.device) // page_size[:, None]  # [B, S]
    page = page.clamp(max=page_logits.shape[3] - 1)  # beyond a row's length there may be no page
    return page_logits.gather(3, page[:, None, None].expand(*page_logits.shape[:3], -1))
