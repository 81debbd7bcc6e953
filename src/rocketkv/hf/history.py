"""The token ids that a cache has seen, which tell whether the next call continues them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rocketkv.errors import InputError

UNKNOWN = -1  # stands for a token that came as an embedding, without an id


class History:
    """The columns that a cache has seen, row by row: token ids, and which of them are padding.

    Attributes:
        num_columns: the number of columns seen, padding included.
        mask: `[B, num_columns]` bool, False in padded columns; None if no column is padded.
        offsets: `[B, 1]` int64, how far images have moved the positions of what follows them, as a model with
            multimodal positions (M-RoPE) keeps it; None if no model has told.
    """

    def __init__(self) -> None:
        self.num_columns = 0
        self.mask: Tensor | None = None
        self.offsets: Tensor | None = None
        self._parts: list[Tensor] = []  # [B, T] int32 each, one after the other

    @property
    def ids(self) -> Tensor:
        """The token ids, `[B, num_columns]` int32, UNKNOWN where none was given; at least one column must be there."""
        if len(self._parts) > 1:
            self._parts = [torch.cat([part.to(self._parts[0].device) for part in self._parts], 1)]
        return self._parts[0]

    @property
    def num_rows(self) -> int | None:
        """The number of rows of the batch; None before the first column."""
        return self._parts[0].shape[0] if self._parts else None

    def append(self, ids: Tensor, mask: Tensor | None) -> None:
        """Add the columns `ids` (`[B, T]` integers); `mask` replaces the mask of all columns, the new ones included."""
        self._parts.append(ids.to(torch.int32, copy=True))
        self.num_columns += ids.shape[1]
        self.mask = mask

    def copy(self) -> "History":
        """Return an independent history in the same state."""
        copied = History()
        copied.num_columns, copied.mask, copied._parts = self.num_columns, self.mask, list(self._parts)
        copied.offsets = self.offsets
        return copied

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` integers)."""
        if self._parts:
            ids = self.ids
            self._parts = [ids.index_select(0, rows.to(ids.device))]
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows.to(self.mask.device))
        if self.offsets is not None:
            self.offsets = self.offsets.index_select(0, rows.to(self.offsets.device))

    def truncate(self, num_columns: int) -> None:
        """Keep the first `num_columns` columns, at least one."""
        self._parts = [self.ids[:, :num_columns]]
        self.num_columns = num_columns
        self.mask = None if self.mask is None else self.mask[:, :num_columns]

    def num_tokens(self, num_columns: int) -> list[int]:
        """Return each row's number of tokens among the first `num_columns` columns, padding left out."""
        if self.mask is None:
            return [num_columns] * (self.num_rows or 0)
        return [int(n) for n in self.mask[:, :num_columns].sum(1).tolist()]

    def num_common(self, ids: Tensor) -> int:
        """Return for how many columns from the first on `ids` (`[B, L]` integers) agree with this history in every row.

        Padded columns and unknown tokens, on either side, agree with anything.
        """
        if not self._parts:
            return 0
        own = self.ids
        width = min(own.shape[1], ids.shape[1])
        own, ids = own[:, :width], ids[:, :width].to(own.device)
        differs = (own != ids) & (own != UNKNOWN) & (ids != UNKNOWN)
        if self.mask is not None:
            differs &= self.mask[:, :width].to(own.device)
        columns = differs.any(0).nonzero()
        return int(columns[0]) if columns.numel() else width

    def check_rows(self, rows: int) -> None:
        """Raise an `InputError` if the columns seen have another number of rows."""
        if self.num_rows not in (None, rows):
            raise InputError(
                f"the cache has {self.num_rows} rows, but {rows} came; give as many (after beams or "
                "num_return_sequences the cache has a row for each), choose some by "
                "cache.batch_select_indices(torch.tensor([0])), or call cache.reset()."
            )

    def check_continued(self, ids: Tensor) -> None:
        """Refuse a text that does not continue the columns seen.

        Args:
            ids: `[B, L]` integers, the whole text so far; B may be a fraction of the rows, as before beam search.

        Raises:
            InputError: the text begins otherwise, or nothing of the text is new.
        """
        if self.num_rows is None:
            return
        repeats, remainder = divmod(self.num_rows, ids.shape[0])
        common = 0 if remainder else self.num_common(ids.repeat_interleave(repeats, 0))
        if common == self.num_columns < ids.shape[1]:
            return
        self.check_rows(ids.shape[0])
        if common == ids.shape[1]:
            problem = f"all {common} tokens of the text were taken in already, so there is nothing to go on from"
        else:
            problem = (
                f"the cache has taken in {self.num_columns} tokens, and the text of {ids.shape[1]} differs from them "
                f"at token {common}"
            )
        raise InputError(
            f"{problem}; give all that the cache has taken in, the last answer included, followed by what is new. "
            "To go back to what they have in common call cache.rewind_to(ids), to begin anew cache.reset()."
        )


def join(histories: Sequence[History]) -> History:
    """Return the rows of several histories of equally many columns, at least one, without padding."""
    joined = History()
    joined.append(torch.cat([history.ids for history in histories]), None)
    offsets = [history.offsets for history in histories if history.offsets is not None]
    joined.offsets = torch.cat(offsets) if len(offsets) == len(histories) else None
    return joined
