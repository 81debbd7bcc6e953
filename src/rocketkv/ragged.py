"""Ragged rows of tokens that grow in steps. The file only stores: it knows no eviction, no selection and no model."""

from copy import copy
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rocketkv.backends import new_storage
from rocketkv.formats import Fields
from rocketkv.ops import on_device, take_tokens

GROWTH = 32  # the least spare capacity, in tokens, so that decode does not reallocate at every token
GROWTH_ON_GPU = 256  # as above; a captured decode step must be captured anew whenever an array has grown
EXPECTED = 1024  # `keep` makes room for at most as many tokens to come as it keeps, and this many more


class RaggedTokens:
    """Parallel per-token arrays, left aligned, in which each batch row and KV head has its own length.

    The host knows all lengths without waiting for the device, because rows grow alike between two prompts.

    Attributes:
        fields: the arrays by name, each `[B, Hkv, capacity, ...]`; slots beyond a length are undefined.
        lengths: `[B, Hkv]` int64, the number of tokens of each row and head, on the device.
        max_length: the largest length, a number on the host.
        is_ragged: True if lengths differ; False lets every reader skip masks.
    """

    def __init__(self, fields: Fields, counts: Tensor) -> None:
        """Take the arrays of rows whose lengths are `counts` (`[B, Hkv]` int64 on the host)."""
        self.fields = dict(fields)
        self.lengths: Tensor
        self.max_length: int
        self.is_ragged: bool
        self.set_lengths(counts)

    @classmethod
    def empty_like(cls, tokens: Fields) -> Self:
        """Return rows without tokens, with batch, heads, widths and dtypes of `tokens` (each `[B, Hkv, T, ...]`)."""
        fields = {name: x.new_empty(*x.shape[:2], 0, *x.shape[3:]) for name, x in tokens.items()}
        like = next(iter(fields.values()))
        return cls(fields, torch.zeros(like.shape[:2], dtype=torch.int64, device="cpu"))

    @property
    def counts(self) -> Tensor:
        """The lengths, `[B, Hkv]` int64 on the host."""
        return self.max_length - self._missing

    @property
    def row_lengths(self) -> list[int]:
        """The largest length of each row's heads, as numbers on the host."""
        return [int(length) for length in self.counts.amax(1)]

    @property
    def num_bytes(self) -> int:
        """The bytes allocated, spare capacity included."""
        return self.lengths.nbytes + sum(x.nbytes for x in self.fields.values())

    @property
    def room(self) -> int:
        """The number of tokens that every row can still take in before the arrays must grow."""
        return min(x.shape[2] for x in self.fields.values()) - self.max_length

    def draft(self) -> Self:
        """Return the same tokens in an object that can grow without a change to this one; both share the arrays."""
        return self.with_fields(self.fields)

    def with_fields(self, fields: Fields) -> Self:
        """Return other arrays for the same tokens, on the same device."""
        other = copy(self)
        other.fields = dict(fields)
        return other

    @property
    def growth(self) -> int:
        """The least spare capacity, in tokens, that new arrays get."""
        return GROWTH if self.lengths.device.type == "cpu" else GROWTH_ON_GPU

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` more tokens in every row."""
        if self.room < num_new:
            self._reallocate(self.max_length + num_new + max(self.growth, self.max_length // 8))

    def views(self) -> Fields:
        """Return the arrays without their spare capacity, each `[B, Hkv, max_length, ...]`."""
        return {name: x[:, :, : self.max_length] for name, x in self.fields.items()}

    def append(self, tokens: Fields, counts: Tensor | None = None) -> None:
        """Add tokens at the end of every row.

        Args:
            tokens: the arrays to add, `[B, Hkv, T, ...]` for every field.
            counts: `[B]` int64 on the host, how many of the T tokens, the first ones, belong to each row; None means
                all T.
        """
        num_new = next(iter(tokens.values())).shape[2]
        self.reserve(num_new)
        if not self.is_ragged:
            for name, field in self.fields.items():
                field[:, :, self.max_length : self.max_length + num_new] = tokens[name]
        else:
            rows, heads = self.lengths.shape
            device = self.lengths.device
            slots = self.lengths[..., None] + torch.arange(num_new, device=device)  # [B, Hkv, T]
            row = torch.arange(rows, device=device)[:, None, None]
            head = torch.arange(heads, device=device)[:, None]
            for name, field in self.fields.items():
                field[row, head, slots] = tokens[name]
        if counts is None:
            self.lengths = self.lengths + num_new
            self.max_length += num_new
        else:
            self.set_lengths(self.counts + counts[:, None])

    def keep(self, kept: "Kept | None", num_new: int = 0) -> Self:
        """Return a copy of the marked tokens, in order, with room for some of the tokens that will follow.

        Args:
            kept: the tokens to keep; None keeps all.
            num_new: the number of tokens expected to follow; see `EXPECTED` for how much room they get at once.
        """
        if kept is None:
            views, counts = self.views(), self.counts
        else:
            counts = kept.counts
            slots = marked_slots(kept.mask, int(counts.max()))
            views = {name: take_tokens(x, slots) for name, x in self.fields.items()}
        copied = self.empty_like(views)
        num_kept = next(iter(views.values())).shape[2]
        copied._reallocate(num_kept + max(copied.growth, min(num_new, num_kept + EXPECTED)))
        copied.append(views)
        copied.set_lengths(counts)
        return copied

    def set_lengths(self, counts: Tensor) -> None:
        """Set the lengths to `counts` (`[B, Hkv]` int64 on the host), and `max_length` and `is_ragged` with them."""
        self.lengths = on_device(counts, next(iter(self.fields.values())).device)
        self.max_length = int(counts.max())
        self._missing = self.max_length - counts  # [B, Hkv] on the host; it stays when all rows grow alike
        self.is_ragged = bool(self._missing.any())

    def to(self, device: torch.device) -> Self:
        """Return the same tokens on a device, without a copy if they are there already."""
        with torch.inference_mode(False):  # the arrays may later be written to with inference mode on or off
            fields = {name: x.to(device) for name, x in self.fields.items()}
        other = self.with_fields(fields)
        other.lengths = self.lengths.to(device)
        return other

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64 on the host); a row may be repeated or left out."""
        counts, own = self.counts[rows], on_device(rows, self.lengths.device)
        with torch.inference_mode(False):
            self.fields = {name: x.index_select(0, own) for name, x in self.fields.items()}
        self.set_lengths(counts)

    def _reallocate(self, capacity: int) -> None:
        grown = {}
        for name, old in self.fields.items():
            new = new_storage(old, (*old.shape[:2], capacity, *old.shape[3:]))
            new[:, :, : self.max_length] = old[:, :, : self.max_length]
            grown[name] = new
        self.fields = grown


class Kept(NamedTuple):
    """The tokens that stage 1 keeps of some ragged rows.

    Attributes:
        mask: `[B, Hkv, S]` bool, True for the tokens to keep, False beyond the lengths.
        counts: `[B, Hkv]` int64 on the host, how many those are, at least 1.
    """

    mask: Tensor
    counts: Tensor


def marked_slots(mask: Tensor, most: int) -> Tensor:
    """Return the slots, `[B, Hkv, most]` int64, at which `mask` (`[B, Hkv, S]` bool) is True, in order, then zeros.

    At most `most` slots of a row may be marked. The host does not wait for the device.
    """
    ranks = (mask.cumsum(2) - 1).masked_fill_(~mask, most)  # all others go to a slot that is dropped
    slots = torch.arange(mask.shape[2], device=mask.device).expand(mask.shape)
    found = torch.zeros(*mask.shape[:2], most + 1, dtype=torch.int64, device=mask.device)
    return found.scatter_(2, ranks, slots)[:, :, :most]


def align_left(tokens: Tensor, padding: Tensor | None) -> Tensor:
    """Move each row of `tokens` to the left by its `padding`; its last columns are then undefined.

    The padding is `[B]` int64 on the host; None moves nothing.
    """
    if padding is None:
        return tokens
    width, shifts = tokens.shape[2], on_device(padding, tokens.device)
    columns = (torch.arange(width, device=tokens.device) + shifts[:, None]).clamp(max=width - 1)  # [B, T]
    return take_tokens(tokens, columns[:, None].expand(-1, tokens.shape[1], -1))
