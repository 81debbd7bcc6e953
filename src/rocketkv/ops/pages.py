"""Page bounds, the index of stage 2: what the keys of a page can be at most and at least, channel by channel."""

import torch
from torch import Tensor

from rocketkv.cache import GROWTH


class PageBounds:
    """Element-wise minimum and maximum of the keys of each page, channel-major so that unread channels are skipped.

    Rows of a batch may have pages of different sizes. Pages of one token are their own bounds and stored once.

    Attributes:
        bounds: `[B, Hkv, 2 * D, capacity]` in the dtype of the keys: minima of all channels, then maxima;
            `[B, Hkv, D, capacity]` if every page holds one token.
        page_size: `[B]` int64, tokens per page.
    """

    def __init__(self, keys: Tensor, lengths: Tensor, page_size: Tensor) -> None:
        """Index `keys` `[B, Hkv, S, D]` float with `lengths` `[B, Hkv]` int64 in pages of `page_size` `[B]` int64."""
        batch, num_kv_heads, num_tokens, head_dim = keys.shape
        self.page_size = page_size
        self.single = bool((page_size == 1).all())
        self.bounds = keys.new_empty(batch, num_kv_heads, (1 if self.single else 2) * head_dim, 0)
        slots = torch.arange(num_tokens, device=keys.device)
        self._fold(keys.transpose(2, 3), slots.expand(batch, num_kv_heads, -1), lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return self.bounds.nbytes

    def extend(self, key: Tensor, slots: Tensor) -> None:
        """Fold one token per row into its page, the last, open one.

        Args:
            key: `[B, Hkv, 1, D]` float.
            slots: `[B, Hkv]` int64, where the token stands in its row.
        """
        self._fold(key.transpose(2, 3), slots[..., None], slots + 1)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64)."""
        self.bounds = self.bounds.index_select(0, rows)
        self.page_size = self.page_size.index_select(0, rows)

    def hybrid_logits(self, query: Tensor, *, num_tokens: int, num_channels: Tensor, scale: float) -> Tensor:
        """Approximate the logit of every token by its page, along the query's largest channels only.

        RocketKV, section "Hybrid Sparse Attention"; the temperature is SparQ's (section "SparQ Attention", step 1).

        Args:
            query: `[B, Hkv, G, D]` float, the query heads of each KV head.
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
        chosen = query.gather(3, channels[:, :, None].expand(-1, -1, query.shape[2], -1))  # [B, Hkv, G, R]
        chosen = chosen * read[:, None, None]
        if not self.single:  # the maximum where the heads together are positive, otherwise the minimum
            channels = channels + head_dim * (query.sum(2).gather(2, channels) > 0)
        bound = self._read(channels, num_tokens)  # [B, Hkv, R, P]
        share = chosen.abs().sum(3, keepdim=True) / query.abs().sum(3, keepdim=True).clamp_min(1e-30)
        temperature = share.sqrt().clamp_min(1e-15)
        return self._to_tokens((chosen @ bound) * (scale / temperature), num_tokens)

    def bound_logits(self, query: Tensor, *, num_tokens: int, scale: float) -> Tensor:
        """Bound the logit of every token from above by its page, along all channels, each query head for itself.

        Quest, section "Dynamically Estimating Token Criticality".

        Args:
            query: `[B, Hkv, G, D]` float, the query heads of each KV head.
            num_tokens: S, tokens to give a logit to.
            scale: factor on the dot products, > 0.

        Returns:
            `[B, Hkv, G, S]` float32, undefined beyond a row's length.

        Reads `2 * D` elements for each page and KV head, D if pages hold one token.
        """
        query = query.float()
        if not self.single:
            query = torch.cat([query.clamp_max(0.0), query.clamp_min(0.0)], dim=3)
        every = torch.arange(query.shape[3], device=query.device).expand(*query.shape[:2], -1)
        return self._to_tokens((query @ self._read(every, num_tokens)) * scale, num_tokens)

    def _read(self, channels: Tensor, num_tokens: int) -> Tensor:
        """The bounds `[B, Hkv, R, P]` float32 of `channels` `[B, Hkv, R]` for the pages of `num_tokens` tokens."""
        pages = min(-(-num_tokens // int(self.page_size.min())), self.bounds.shape[3])
        index = channels[..., None].expand(-1, -1, -1, pages)
        return self.bounds[..., :pages].gather(2, index).float()

    def _to_tokens(self, page_logits: Tensor, num_tokens: int) -> Tensor:
        """Give each of `num_tokens` tokens the logit of its page: `[B, Hkv, G, P]` to `[B, Hkv, G, S]`."""
        page = torch.arange(num_tokens, device=page_logits.device) // self.page_size[:, None]  # [B, S]
        page = page.clamp(max=page_logits.shape[3] - 1)  # beyond a row's length there may be no page
        return page_logits.gather(3, page[:, None, None].expand(*page_logits.shape[:3], -1))

    def _fold(self, keys: Tensor, slots: Tensor, lengths: Tensor) -> None:
        """Fold `keys` `[B, Hkv, D, T]` standing at `slots` `[B, Hkv, T]` into their pages, unless beyond `lengths`."""
        page = slots // self.page_size[:, None, None]
        self._reserve(int(page.max()) + 1)
        head_dim = keys.shape[2]
        beyond = (slots >= lengths[..., None])[:, :, None]  # [B, Hkv, 1, T]
        index = page[:, :, None].expand_as(keys)
        maxima = self.bounds[:, :, -head_dim:]
        maxima.scatter_reduce_(3, index, keys.masked_fill(beyond, -torch.inf), "amax")
        if not self.single:
            minima = self.bounds[:, :, :head_dim]
            minima.scatter_reduce_(3, index, keys.masked_fill(beyond, torch.inf), "amin")

    def _reserve(self, num_pages: int) -> None:
        """Make room for `num_pages`; a page without tokens has the bounds of nothing, +inf and -inf."""
        used = self.bounds.shape[3]
        if num_pages <= used:
            return
        grown = self.bounds.new_full((*self.bounds.shape[:3], num_pages + GROWTH), -torch.inf)
        if not self.single:
            grown[:, :, : grown.shape[2] // 2] = torch.inf
        grown[..., :used] = self.bounds
        self.bounds = grown
