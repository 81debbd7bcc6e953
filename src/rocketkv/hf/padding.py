"""Which new columns of a forward pass are padding, read from the mask and the positions that came with the pass.

A column is a token's index in the padded batch, where padding counts too. These functions know of no cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rocketkv.errors import InputError, UnsupportedError


class Padding(NamedTuple):
    """The padding of a forward pass with T new columns per row.

    Attributes:
        counts: `[B]` int64 on the host, the number of padded columns among the new ones; None if none is padded.
        order: `[B, T]` int64, the new columns with the padded ones first; None if padding comes first already.
        mask: `[B, seen + T]` bool, False in padded columns, earlier ones included; None if no column is padded.
    """

    counts: Tensor | None = None
    order: Tensor | None = None
    mask: Tensor | None = None

    def row(self, index: int) -> "Padding":
        """Return the padding of one row of the batch."""
        return Padding(*(None if x is None else x[index : index + 1] for x in self))


def read(attention_mask: object, seen: int, seen_mask: Tensor | None, *, num_rows: int, num_new: int) -> Padding:
    """Find the padded columns among the new ones.

    Args:
        attention_mask: `[B, seen + T]` of any dtype, zero in padded columns; None if no new column is padded.
        seen: the number of columns that the cache has seen, padding included.
        seen_mask: `[B, seen]` bool, False in the padded ones of those columns; None if none is padded.
        num_rows: B.
        num_new: T, at least 1.

    Raises:
        InputError: the mask has another number of rows or columns.
        UnsupportedError: the mask is no two-dimensional tensor, it pads at the right, it leaves a row without a new
            token, or it differs from `seen_mask` in the columns seen.
    """
    if attention_mask is None:
        return Padding(mask=None if seen_mask is None else pad(seen_mask, (0, num_new), value=True))
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise UnsupportedError(
            "a RocketKVCache makes its own masks; give a two-dimensional attention_mask of zeros and ones, or none."
        )
    if attention_mask.shape != (num_rows, seen + num_new):
        raise InputError(
            f"attention_mask has {attention_mask.shape[1]} columns, but the cache has seen {seen} and {num_new} "
            f"are new; give {seen + num_new}."
            if attention_mask.shape[1] != seen + num_new
            else f"attention_mask has {attention_mask.shape[0]} rows for {num_rows}; give as many."
        )
    mask = attention_mask.bool()
    new, past = mask[:, seen:], mask[:, :seen]
    if not bool(new[:, -1].all()):
        if bool(new.any(1).all()):
            raise UnsupportedError(
                "attention_mask ends in zeros: the prompts are padded at the right; "
                "pad at the left (tokenizer.padding_side='left')."
            )
        raise UnsupportedError(
            f"attention_mask leaves a row without a token among the {num_new} new columns: they are all padding; "
            "take in the prompts in one piece, without prefill_chunk_size, or in chunks longer than the padding."
        )
    if not torch.equal(past, torch.ones_like(past) if seen_mask is None else seen_mask.to(past.device)):
        raise UnsupportedError(
            "attention_mask hides or reveals tokens that the cache has already taken in; "
            "keep the mask of earlier columns as it was, ones for generated tokens."
        )
    if bool(new.all()):
        return Padding(mask=mask)
    is_left = bool((new[:, 1:] >= new[:, :-1]).all())  # else a token of the last answer stands before the padding
    order = None if is_left else new.to(torch.uint8).argsort(dim=1, stable=True)
    return Padding((num_new - new.sum(1)).cpu(), order, mask)
