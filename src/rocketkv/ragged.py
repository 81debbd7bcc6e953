"""Ragged rows of tokens that grow in steps. The file only stores: it knows no eviction, no selection and no model."""

import torch
from torch import Tensor

from rocketkv.backends import new_storage
from rocketkv.formats import Fields
from rocketkv.ops import take_tokens

GROWTH = 32  # the least spare capacity, in tokens, so that decode does not reallocate at every token
GROWTH_ON_GPU = 256  # as above; a captured decode step must be captured anew whenever an array has grown
EXPECTED = 1024  # `keep` makes room for at most as many tokens to come as it keeps, and this many more


class RaggedTokens:
    """Parallel per-token arrays, left aligned, in which each batch row and KV head has its own length.

    Attributes:
        fields: the arrays by name, each `[B, Hkv, capacity, ...]`; slots beyond a length are undefined.
        lengths: `[B, Hkv]` int64, the number of tokens of each row and head.
        max_length: the largest length, a number on the host.
        is_ragged: True if lengths differ; False lets every reader skip masks.
    """

    def __init__(self, fields: Fields, lengths: Tensor, max_length: int, is_ragged: bool) -> None:
        self.fields = dict(fields)
        self.lengths = lengths
        self.max_length = max_length
        self.is_ragged = is_ragged

    @classmethod
    def empty_like(cls, tokens: Fields) -> "RaggedTokens":
        """Return rows without tokens, with batch, heads, widths and dtypes of `tokens` (each `[B, Hkv, T, ...]`)."""
        fields = {name: x.new_empty(*x.shape[:2], 0, *x.shape[3:]) for name, x in tokens.items()}
        like = next(iter(fields.values()))
        return cls(fields, torch.zeros(like.shape[:2], dtype=torch.int64, device=like.device), 0, False)

    @property
    def num_bytes(self) -> int:
        """The bytes allocated, spare capacity included."""
        return self.lengths.nbytes + sum(x.nbytes for x in self.fields.values())

    @property
    def room(self) -> int:
        """The number of tokens that every row can still take in before the arrays must grow."""
        return min(x.shape[2] for x in self.fields.values()) - self.max_length

    def draft(self) -> "RaggedTokens":
        """Return the same tokens in an object that can grow without a change to this one; both share the arrays."""
        return RaggedTokens(self.fields, self.lengths, self.max_length, self.is_ragged)

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
            counts: `[B]` int64, how many of the T tokens, the first ones, belong to each row; None means all T.
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
        """Return a copy of the marked tokens, in order, with room for some of the tokens that will follow.

        Args:
            mask: `[B, Hkv, max_length]` bool, True for the tokens to keep, False beyond the lengths; None keeps all.
            num_new: the number of tokens expected to follow; see `EXPECTED` for how much room they get at once.
        """
        if mask is None:
            views, lengths = self.views(), self.lengths.clone()
        else:
            lengths = mask.sum(2)
            slots = (~mask).to(torch.uint8).argsort(dim=2, stable=True)[:, :, : int(lengths.max())]
            views = {name: take_tokens(x, slots) for name, x in self.fields.items()}
        kept = RaggedTokens.empty_like(views)
        num_kept = next(iter(views.values())).shape[2]
        kept._reallocate(num_kept + max(kept.growth, min(num_new, num_kept + EXPECTED)))
        kept.append(views)
        kept.set_lengths(lengths)
        return kept

    def set_lengths(self, lengths: Tensor) -> None:
        """Set `[B, Hkv]` int64 lengths, and `max_length` and `is_ragged` with them."""
        self.lengths = lengths
        self.max_length = int(lengths.max())
        self.is_ragged = int(lengths.min()) != self.max_length

    def to(self, device: torch.device) -> "RaggedTokens":
        """Return the same tokens on a device, without a copy if they are there already."""
        with torch.inference_mode(False):  # the arrays may later be written to with inference mode on or off
            fields = {name: x.to(device) for name, x in self.fields.items()}
        return RaggedTokens(fields, self.lengths.to(device), self.max_length, self.is_ragged)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64); a row may be repeated or left out."""
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
    """Move each row of `tokens` to the left by its `padding` (`[B]` int64); its last columns are then undefined."""
    if padding is None:
        return tokens
    width = tokens.shape[2]
    columns = (torch.arange(width, device=tokens.device) + padding[:, None]).clamp(max=width - 1)  # [B, T]
    return take_tokens(tokens, columns[:, None].expand(-1, tokens.shape[1], -1))
