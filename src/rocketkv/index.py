"""The indices, which are stored beside the keys so that a step can score tokens without reading their keys."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from rocketkv.backends import build_lowbit, build_pages, new_storage
from rocketkv.ops import (
    GROUP,
    GROUPS_PER_BLOCK,
    PAGES_PER_BLOCK,
    LowBitKeys,
    PageBounds,
    append_lowbit,
    bound_logits,
    extend_spread,
    fold_into_pages,
    hybrid_logits,
    lowbit_logits,
    on_device,
)

UNLIMITED = 1 << 62  # tokens


class Index(ABC):
    """What a selection method stores beside the keys to score them cheaply.

    An index of your own must define `extend`, `select_rows` and `logits`. An index whose `buffers` backends write to
    must also define `capacity` and `reserve`.
    """

    @abstractmethod
    def extend(self, key: Tensor, slots: Tensor) -> None:
        """Take in one token per row, with `key` `[B, Hkv, 1, D]` at `slots` `[B, Hkv]` int64."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64); a row may be repeated or left out."""

    @abstractmethod
    def logits(
        self, query: Tensor, *, lengths: Tensor, num_tokens: int, num_channels: Tensor, scale: float
    ) -> Tensor | None:
        """Estimate the logit of every token for the query of the newest token.

        Args:
            query: `[B, Hkv, G, D]` float, the query heads of each KV head.
            lengths: `[B, Hkv]` int64, the number of tokens in each row, the newest one included.
            num_tokens: the largest of the lengths.
            num_channels: `[B]` int64, the number of channels to read, 1 to D.
            scale: the factor on the dot products.

        Returns:
            `[B, Hkv, G, num_tokens]` float32, undefined beyond the lengths; None lets the step attend to all tokens.
        """

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors that the index consists of."""
        return ()

    @property
    def num_bytes(self) -> int:
        """The bytes allocated, spare capacity included."""
        return sum(x.nbytes for x in self.buffers)

    @property
    def capacity(self) -> int:
        """The number of tokens that every row may have before a buffer must grow."""
        return UNLIMITED

    def reserve(self, num_tokens: int) -> None:  # noqa: B027  # an index without buffers has nothing to do
        """Make room for rows of `num_tokens` tokens."""


class PageIndex(Index):
    """The bounds of each page of consecutive tokens, which grow in steps; see `ops/pages.py`.

    Attributes:
        bounds: `[B, Hkv, blocks, 2 * D, PAGES_PER_BLOCK]` in the dtype of the keys; D instead of 2 * D if every page
            has one token.
        page_size: `[B]` int64 on the device, the tokens per page; rows of a batch may differ.
        spread: `[B, Hkv, D]` float32, the weights of the channels when channels are chosen; None chooses by the query
            alone, as published.
        earlier_spread: the spread from before the newest token, by which the newest token's step chooses channels.
    """

    def __init__(self, keys: Tensor, lengths: Tensor, page_size: Tensor, *, weighted: bool = False) -> None:
        """Index `keys` `[B, Hkv, S, D]` float with `lengths` `[B, Hkv]` int64 in pages of `page_size` `[B]` int64.

        The page sizes are on the host. With `weighted` the index stores the spread of the channels, too.
        """
        self.page_size = on_device(page_size, keys.device)
        self._smallest = int(page_size.min())
        self._head_dim = keys.shape[3]
        channels = keys.shape[3] if int(page_size.max()) == 1 else 2 * keys.shape[3]
        self.bounds = keys.new_empty(*keys.shape[:2], 0, channels, PAGES_PER_BLOCK)
        self.reserve(keys.shape[2])
        self.spread = _new_spread(keys) if weighted else None
        build_pages(self.stored, keys, lengths)
        self.earlier_spread = self.spread

    @property
    def capacity(self) -> int:
        """The number of tokens that every row may have before the bounds must grow."""
        return self.bounds.shape[2] * PAGES_PER_BLOCK * self._smallest

    def reserve(self, num_tokens: int) -> None:
        """Make room for rows of `num_tokens` tokens."""
        used = self.bounds.shape[2]
        if num_tokens <= self.capacity:
            return
        num_blocks = -(-num_tokens // (PAGES_PER_BLOCK * self._smallest))
        grown = new_storage(
            self.bounds, (*self.bounds.shape[:2], num_blocks + max(1, num_blocks // 8), *self.bounds.shape[3:])
        )
        grown[:, :, used:] = -torch.inf
        if grown.shape[3] > self._head_dim:
            grown[:, :, used:, : self._head_dim] = torch.inf
        grown[:, :, :used] = self.bounds
        self.bounds = grown

    def extend(self, key: Tensor, slots: Tensor) -> None:
        """Take in one token per row, `key` `[B, Hkv, 1, D]` at `slots` `[B, Hkv]` int64, into the last, open page."""
        self.reserve(int(slots.max()) + 1)
        fold_into_pages(self.bounds, key, slots=slots[..., None], page_size=self.page_size)
        if self.spread is not None:
            self.earlier_spread = self.spread.clone()
            extend_spread(self.spread, self.bounds, lengths=slots + 1, page_size=self.page_size)

    def logits(self, query: Tensor, *, lengths: Tensor, num_tokens: int, num_channels: Tensor, scale: float) -> Tensor:
        """Return for each token the approximate logit of its page; see `Index`."""
        return hybrid_logits(
            query,
            self.bounds,
            page_size=self.page_size,
            num_tokens=num_tokens,
            num_channels=num_channels,
            scale=scale,
            spread=self.earlier_spread,
        )

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64); a row may be repeated or left out."""
        with torch.inference_mode(False):
            self.bounds = self.bounds.index_select(0, rows)
            if self.spread is not None:
                self.spread = self.earlier_spread = self.spread.index_select(0, rows)
        self.page_size = self.page_size.index_select(0, rows)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors of the index."""
        return tuple(x for x in self.stored if x is not None)

    @property
    def stored(self) -> PageBounds:
        """The index in the form that operations and backends take."""
        return PageBounds(self.bounds, self.page_size, self.spread)


class QuestIndex(PageIndex):
    """The same bounds, scored as Quest scores a page: both bounds are read, along all channels."""

    def logits(self, query: Tensor, *, lengths: Tensor, num_tokens: int, num_channels: Tensor, scale: float) -> Tensor:
        """Return for each token the upper bound of its page's logits; see `Index`."""
        return bound_logits(query, self.bounds, page_size=self.page_size, num_tokens=num_tokens, scale=scale)


class LowBitIndex(Index):
    """The keys in 4 bits, which grow in steps; see `ops/lowbit.py`.

    Attributes:
        stored: the codes, ranges, open keys and spread.
        earlier_spread: the spread from before the newest token, by which the newest token's step chooses channels.
    """

    def __init__(self, keys: Tensor, lengths: Tensor) -> None:
        """Index `keys` `[B, Hkv, S, D]` float with `lengths` `[B, Hkv]` int64."""
        batch, num_kv_heads, _, head_dim = keys.shape
        shape = (batch, num_kv_heads, 0, head_dim, GROUPS_PER_BLOCK)
        self.stored = LowBitKeys(
            keys.new_empty(*shape, GROUP // 2, dtype=torch.uint8),
            keys.new_empty(*shape, 2),
            new_storage(keys, (batch, num_kv_heads, head_dim, GROUP)),
            _new_spread(keys),
        )
        self.reserve(keys.shape[2])
        build_lowbit(self.stored, keys, lengths)
        self.earlier_spread = self.stored.spread

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors of the index."""
        return self.stored

    @property
    def capacity(self) -> int:
        """The number of tokens that every row may have before codes and ranges must grow."""
        return self.stored.codes.shape[2] * GROUPS_PER_BLOCK * GROUP

    def reserve(self, num_tokens: int) -> None:
        """Make room for rows of `num_tokens` tokens."""
        if num_tokens > self.capacity:
            num_blocks = -(-num_tokens // (GROUPS_PER_BLOCK * GROUP))
            codes, ranges = (_grown(x, num_blocks) for x in self.stored[:2])
            self.stored = self.stored._replace(codes=codes, ranges=ranges)

    def extend(self, key: Tensor, slots: Tensor) -> None:
        """Take in one token per row, `key` `[B, Hkv, 1, D]` at `slots` `[B, Hkv]` int64, into the open group."""
        self.reserve(int(slots.max()) + 1)
        self.earlier_spread = self.stored.spread.clone()
        append_lowbit(self.stored, key, slots)

    def logits(self, query: Tensor, *, lengths: Tensor, num_tokens: int, num_channels: Tensor, scale: float) -> Tensor:
        """Return the logit of each token's key in 4 bits; see `Index`."""
        return lowbit_logits(
            query,
            self.stored._replace(spread=self.earlier_spread),
            lengths=lengths,
            num_tokens=num_tokens,
            num_channels=num_channels,
            scale=scale,
        )

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64); a row may be repeated or left out."""
        with torch.inference_mode(False):
            self.stored = LowBitKeys(*(x.index_select(0, rows) for x in self.stored))
        self.earlier_spread = self.stored.spread


def _new_spread(keys: Tensor) -> Tensor:
    """Return an undefined tensor for the spread of each channel of `keys` `[B, Hkv, S, D]`."""
    return keys.new_empty(*keys.shape[:2], keys.shape[3], dtype=torch.float32)


def _grown(old: Tensor, num_blocks: int) -> Tensor:
    """Return a copy of `old` with `num_blocks` blocks along dim 2; the added blocks are undefined."""
    new = new_storage(old, (*old.shape[:2], num_blocks, *old.shape[3:]))
    new[:, :, : old.shape[2]] = old
    return new
