"""Page bounds, an index of stage 2: the minimum and maximum of the keys of each page, channel by channel.

Bounds are `[B, Hkv, blocks, 2 * D, PAGES_PER_BLOCK]`: minima of all channels, then maxima. They are channel-major
within a block of pages, so that no memory of unread channels is touched. Where every page has one token, minima and
maxima are the keys themselves and are stored once, as `[B, Hkv, blocks, D, PAGES_PER_BLOCK]`.

The spread, if channels are chosen by it, is `[B, Hkv, D]` float32. It is the sum of the ranges of the keys in each full
block of pages, added up in order; in a row without a full block it is the range of all keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rocketkv.ops.channels import add_runs, largest_channels

PAGES_PER_BLOCK = 32  # one cache line has a channel's bounds of a block in 16 bits; csrc/kernels.h has the same number


class PageBounds(NamedTuple):
    """The tensors of the index of a layer.

    Attributes:
        bounds: `[B, Hkv, blocks, D or 2 * D, PAGES_PER_BLOCK]` float.
        page_size: `[B]` int64, the tokens per page.
        spread: `[B, Hkv, D]` float32; None if channels are chosen by the query alone.
    """

    bounds: Tensor
    page_size: Tensor
    spread: Tensor | None


def build_pages(index: PageBounds, keys: Tensor, lengths: Tensor) -> None:
    """Let an empty index take in all keys, in place.

    Args:
        index: the index, whose minima are +inf and maxima -inf, with an undefined spread, or None for it.
        keys: `[B, Hkv, S, D]` in the dtype of the bounds.
        lengths: `[B, Hkv]` int64, the number of tokens in each row; keys at slots beyond are left out.

    Reads `B * Hkv * S * D` elements.
    """
    bounds, page_size, spread = index
    slots = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3])
    fold_into_pages(bounds, keys, slots=slots, page_size=page_size, lengths=lengths)
    if spread is None:
        return
    blocks = torch.arange(bounds.shape[2], device=keys.device)
    tokens = (page_size * PAGES_PER_BLOCK)[:, None, None]  # the tokens of a full block
    left = lengths[..., None] - blocks * tokens  # [B, Hkv, blocks], the tokens from the start of each block on
    ranges = _ranges(bounds, keys.shape[3], -(-left // page_size[:, None, None]))
    add_runs(spread.zero_(), ranges, (left >= tokens) | (blocks == 0))


def fold_into_pages(
    bounds: Tensor, keys: Tensor, *, slots: Tensor, page_size: Tensor, lengths: Tensor | None = None
) -> None:
    """Widen the bounds of each key's page to include the key, in place.

    Args:
        bounds: `[B, Hkv, blocks, D or 2 * D, PAGES_PER_BLOCK]` float; a page without tokens has +inf and -inf.
        keys: `[B, Hkv, T, D]` in the dtype of `bounds`.
        slots: `[B, Hkv, T]` int64, the slots of the keys in their rows.
        page_size: `[B]` int64, the tokens per page.
        lengths: `[B, Hkv]` int64; keys at slots beyond are left out; None takes in all keys.

    Reads `B * Hkv * T * D` elements.
    """
    head_dim, num_rows = keys.shape[3], bounds.shape[3]
    page = slots // page_size[:, None, None]  # [B, Hkv, T]
    first = page // PAGES_PER_BLOCK * (num_rows * PAGES_PER_BLOCK) + page % PAGES_PER_BLOCK
    minima = first[..., None] + PAGES_PER_BLOCK * torch.arange(head_dim, device=keys.device)  # [B, Hkv, T, D]
    maxima = minima + (num_rows - head_dim) * PAGES_PER_BLOCK
    low = high = keys
    if lengths is not None:
        beyond = (slots >= lengths[..., None])[..., None]
        low, high = keys.masked_fill(beyond, torch.inf), keys.masked_fill(beyond, -torch.inf)
    flat = bounds.view(*bounds.shape[:2], -1)
    flat.scatter_reduce_(2, maxima.flatten(2), high.flatten(2), "amax")
    if num_rows > head_dim:
        flat.scatter_reduce_(2, minima.flatten(2), low.flatten(2), "amin")


def extend_spread(spread: Tensor, bounds: Tensor, *, lengths: Tensor, page_size: Tensor) -> None:
    """Add the range of a block of pages to the spread, in place, if the row's newest token filled that block.

    While a row has no full block, its spread is set to the range of all its keys.

    Args:
        spread: `[B, Hkv, D]` float32.
        bounds: `[B, Hkv, blocks, D or 2 * D, PAGES_PER_BLOCK]` float, with the newest token taken in.
        lengths: `[B, Hkv]` int64, the number of tokens in each row, the newest one included.
        page_size: `[B]` int64, the tokens per page.

    Reads one block of each row.
    """
    tokens = page_size[:, None] * PAGES_PER_BLOCK  # the tokens of a full block
    block = (lengths - 1) // tokens  # [B, Hkv]
    newest = bounds.gather(2, block[..., None, None, None].expand(-1, -1, 1, *bounds.shape[3:]))
    left = lengths - block * tokens
    ranges = _ranges(newest, spread.shape[2], -(-left // page_size[:, None])[..., None])[:, :, 0]
    is_full, is_first = (left == tokens)[..., None], (block == 0)[..., None]
    spread[:] = ranges.where(is_first, (spread + ranges).where(is_full, spread))


def _ranges(bounds: Tensor, head_dim: int, num_pages: Tensor) -> Tensor:
    """Return the ranges of the keys, `[B, Hkv, blocks, D]` float32, in the first `num_pages` pages of each block.

    `num_pages` is `[B, Hkv, blocks]` int64.
    """
    beyond = torch.arange(PAGES_PER_BLOCK, device=bounds.device) >= num_pages[..., None, None]
    high = bounds[..., -head_dim:, :].masked_fill(beyond, -torch.inf).amax(4).float()
    low = bounds[..., :head_dim, :].masked_fill(beyond, torch.inf).amin(4).float()
    return (high - low).clamp_min(0.0)  # the range of no keys is 0


def hybrid_logits(
    query: Tensor,
    bounds: Tensor,
    *,
    page_size: Tensor,
    num_tokens: int,
    num_channels: Tensor,
    scale: float,
    spread: Tensor | None = None,
) -> Tensor:
    """Approximate the logit of every token by its page's bounds, along the query's largest channels only.

    Source: RocketKV, section "Hybrid Sparse Attention"; the temperature is that of SparQ (section "SparQ Attention",
    step 1). With a spread, |q| times the spread replaces |q| in the choice of channels and in the temperature.

    Args:
        query: `[B, Hkv, G, D]` float, the query heads of each KV head.
        bounds: `[B, Hkv, blocks, D or 2 * D, PAGES_PER_BLOCK]` float.
        page_size: `[B]` int64, the tokens per page.
        num_tokens: S, the number of tokens to give a logit to.
        num_channels: `[B]` int64, the number of channels to read, 1 to D.
        scale: the factor on the dot products.
        spread: `[B, Hkv, D]` float32, the spread from before the newest token; None takes |q| alone, as published.

    Returns:
        `[B, Hkv, G, S]` float32, undefined beyond a row's length.

    Reads `num_channels` elements for each page and KV head, and the spread, `D` float32 numbers, if there is one; dense
    attention reads `2 * D` elements for each token.
    """
    query = query.float()
    head_dim = query.shape[3]
    channels, chosen = largest_channels(query, num_channels, spread)
    sizes, chosen_sizes = query.abs(), chosen.abs()
    if spread is not None:
        sizes = sizes * spread[:, :, None]
        chosen_sizes = chosen_sizes * spread.gather(2, channels)[:, :, None]
    share = chosen_sizes.sum(3, keepdim=True) / sizes.sum(3, keepdim=True)
    share = share.where(share > 0, 1.0)  # the share is 0 or NaN where all sizes are zero, or where one is NaN
    if bounds.shape[3] > head_dim:  # the maximum is read where the sum of the heads is positive, else the minimum
        channels = channels + head_dim * (query.sum(2).gather(2, channels) > 0)
    rows = channels[:, :, None, :, None].expand(-1, -1, bounds.shape[2], -1, PAGES_PER_BLOCK)
    bound = bounds.gather(3, rows).float()  # [B, Hkv, blocks, R, PAGES_PER_BLOCK]
    return _of_tokens(_dot(chosen, bound) * (scale / share.sqrt()), page_size, num_tokens)


def bound_logits(query: Tensor, bounds: Tensor, *, page_size: Tensor, num_tokens: int, scale: float) -> Tensor:
    """Bound the logit of every token from above by its page's bounds, along all channels, for each query head alone.

    Source: Quest (arXiv:2406.10774), section "Dynamically Estimating Token Criticality".

    Args:
        query: `[B, Hkv, G, D]` float, the query heads of each KV head.
        bounds: `[B, Hkv, blocks, D or 2 * D, PAGES_PER_BLOCK]` float.
        page_size: `[B]` int64, the tokens per page.
        num_tokens: S, the number of tokens to give a logit to.
        scale: the factor on the dot products, > 0.

    Returns:
        `[B, Hkv, G, S]` float32, undefined beyond a row's length.

    Reads `2 * D` elements for each page and KV head (D where bounds are stored once); dense attention reads `2 * D` for
    each token.
    """
    query = query.float()
    if bounds.shape[3] > query.shape[3]:
        query = torch.cat([query.clamp_max(0.0), query.clamp_min(0.0)], dim=3)
    return _of_tokens(_dot(query, bounds.float()) * scale, page_size, num_tokens)


def _dot(query: Tensor, bounds: Tensor) -> Tensor:
    """Multiply `[B, Hkv, G, R]` with every page of `[B, Hkv, blocks, R, PAGES_PER_BLOCK]`; return `[B, Hkv, G, P]`."""
    return (query[:, :, None] @ bounds).transpose(2, 3).flatten(3)


def _of_tokens(page_logits: Tensor, page_size: Tensor, num_tokens: int) -> Tensor:
    """Give each of `num_tokens` tokens the logit of its page: `[B, Hkv, G, P]` to `[B, Hkv, G, S]`."""
    page = torch.arange(num_tokens, device=page_logits.device) // page_size[:, None]  # [B, S]
    page = page.clamp(max=page_logits.shape[3] - 1)  # slots beyond a row's length may have no page
    return page_logits.gather(3, page[:, None, None].expand(*page_logits.shape[:3], -1))
