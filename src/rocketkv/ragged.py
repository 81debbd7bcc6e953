"""Ragged rows of tokens that grow in steps. Storage only: this file knows neither eviction, selection nor any model."""

import torch
from torch import Tensor

from rocketkv.backends import new_storage
from rocketkv.formats import Fields
from rocketkv.ops import take_tokens

GROWTH = 32  # spare tokens allocated at least, so that decode does not reallocate at every token
EXPECTED = 1024  # tokens expected that room is made for at once, beyond as many as are there


class RaggedTokens:
    """Parallel per-token arrays, left aligned, each (batch row, KV head) with a length of its own.

    Attributes:
        fields: the arrays by name, each `[B, Hkv, capacity, ...]`; what lies beyond a length is undefined.
        lengths: `[B, Hkv]` int64, tokens in use.
        max_length: the largest length, on the host.
        is_ragged: whether lengths differ; False lets every reader skip masks.
    """

    def __init__(self, fields: Fields, lengths: Tensor, max_length: int, is_ragged: bool) -> None:
        self.fields = dict(fields)
        self.lengths = lengths
        self.max_length = max_length
        self.is_ragged = is_ragged

    @classmethod
    def empty_like(cls, tokens: Fields) -> "RaggedTokens":
        """No tokens yet, in the batch, heads, widths and dtypes of `tokens` (each `[B, Hkv, T, ...]`)."""
        fields = {name: x.new_empty(*x.shape[:2], 0, *x.shape[3:]) for name, x in tokens.items()}
        like = next(iter(fields.values()))
        return cls(fields, torch.zeros(like.shape[:2], dtype=torch.int64, device=like.device), 0, False)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return self.lengths.nbytes + sum(x.nbytes for x in self.fields.values())

    @property
    def room(self) -> int:
        """Tokens that every row can still take in without growing."""
        return min(x.shape[2] for x in self.fields.values()) - self.max_length

    def draft(self) -> "RaggedTokens":
        """The same tokens, to go on from without a change to these: it shares what lies within the lengths."""
        return RaggedTokens(self.fields, self.lengths, self.max_length, self.is_ragged)

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` more tokens in every row."""
        if self.room < num_new:
            self._reallocate(self.max_length + num_new + max(GROWTH, self.max_length // 8))

    def views(self) -> Fields:
        """The arrays without their spare capacity, each `[B, Hkv, max_length, ...]`."""
        return {name: x[:, :, : self.max_length] for name, x in self.fields.items()}

    def append(self, tokens: Fields, counts: Tensor | None = None) -> None:
        """Add tokens at the end of every row.

        Args:
            tokens: `[B, Hkv, T, ...]` for every field.
            counts: `[B]` int64, how many of the T belong to each row, the first ones; all of them if None.
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
            self.set_lengths(self.lengths + counts[:, None])

    def keep(self, mask: Tensor | None, num_new: int = 0) -> "RaggedTokens":
        """Copy the tokens marked True, in order, with room for `num_new` more, or for the first of very many.

        Args:
            mask: `[B, Hkv, max_length]` bool, False beyond the lengths; None keeps everything.
            num_new: tokens expected to follow.
        """
        if mask is None:
            views, lengths = self.views(), self.lengths.clone()
        else:
            lengths = mask.sum(2)
            slots = (~mask).to(torch.uint8).argsort(dim=2, stable=True)[:, :, : int(lengths.max())]
            views = {name: take_tokens(x, slots) for name, x in self.fields.items()}
        kept = RaggedTokens.empty_like(views)
        num_kept = next(iter(views.values())).shape[2]
        kept._reallocate(num_kept + max(GROWTH, min(num_new, num_kept + EXPECTED)))
        kept.append(views)
        kept.set_lengths(lengths)
        return kept

    def set_lengths(self, lengths: Tensor) -> None:
        """Take over `[B, Hkv]` lengths and what the host knows of them."""
        self.lengths = lengths
        self.max_length = int(lengths.max())
        self.is_ragged = int(lengths.min()) != self.max_length

    def to(self, device: torch.device) -> "RaggedTokens":
        """The same on a device, without a copy if it is there already."""
        with torch.inference_mode(False):  # written to under either mode later
            fields = {name: x.to(device) for name, x in self.fields.items()}
        return RaggedTokens(fields, self.lengths.to(device), self.max_length, self.is_ragged)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64), repeated or dropped as they come."""
        rows = rows.to(self.lengths.device)
        self.set_lengths(self.lengths.index_select(0, rows))
        with torch.inference_mode(False):
            self.fields = {name: x.index_select(0, rows) for name, x in self.fields.items()}

    def _reallocate(self, capacity: int) -> None:
        grown = {}
        for name, old in self.fields.items():
            new = new_storage(old, (*old.shape[:2], capacity, *old.shape[3:]))
            new[:, :, : self.max_length] = old[:, :, : self.max_length]
            grown[name] = new
        self.fields = grown


def align_left(tokens: Tensor, padding: Tensor | None) -> Tensor:
    """Move each row's tokens to the front, its `padding` (`[B]` int64) columns, undefined now, to the end."""
    if padding is None:
        return tokens
    width = tokens.shape[2]
    columns = (torch.arange(width, device=tokens.device) + padding[:, None]).clamp(max=width - 1)  # [B, T]
    return take_tokens(tokens, columns[:, None].expand(-1, tokens.shape[1], -1))
