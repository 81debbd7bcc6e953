"""What a cache has taken in, as token ids: to tell whether the next call continues it."""

from collections.abc import Sequence

import torch
from torch import Tensor

UNKNOWN = -1  # stands for a token that came as an embedding, without its id


class History:
    """The columns that a cache has seen, row by row: token ids, and which of them are padding.

    Attributes:
        num_columns: columns seen, padding included.
        mask: `[B, num_columns]` bool, False in padded columns; None: there are none.
    """

    def __init__(self) -> None:
        self.num_columns = 0
        self.mask: Tensor | None = None
        self._parts: list[Tensor] = []  # [B, T] int32 each, one after the other

    @property
    def ids(self) -> Tensor:
        """The token ids, `[B, num_columns]` int32, UNKNOWN where none was given; at least one column is there."""
        if len(self._parts) > 1:
            self._parts = [torch.cat([part.to(self._parts[0].device) for part in self._parts], 1)]
        return self._parts[0]

    @property
    def num_rows(self) -> int | None:
        """Rows of the batch; None before the first column."""
        return self._parts[0].shape[0] if self._parts else None

    def append(self, ids: Tensor, mask: Tensor | None) -> None:
        """Add the columns `ids` (`[B, T]` integers); `mask`: of all columns from now on, see above."""
        self._parts.append(ids.to(torch.int32, copy=True))
        self.num_columns += ids.shape[1]
        self.mask = mask

    def copy(self) -> "History":
        """An independent history in the same state."""
        copied = History()
        copied.num_columns, copied.mask, copied._parts = self.num_columns, self.mask, list(self._parts)
        return copied

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` integers)."""
        if self._parts:
            ids = self.ids
            self._parts = [ids.index_select(0, rows.to(ids.device))]
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows.to(self.mask.device))

    def truncate(self, num_columns: int) -> None:
        """Keep the first `num_columns`, at least one."""
        self._parts = [self.ids[:, :num_columns]]
        self.num_columns = num_columns
        self.mask = None if self.mask is None else self.mask[:, :num_columns]

    def num_tokens(self, num_columns: int) -> list[int]:
        """Tokens of each row among the first columns, padding left out."""
        if self.mask is None:
            return [num_columns] * (self.num_rows or 0)
        return [int(n) for n in self.mask[:, :num_columns].sum(1).tolist()]

    def num_common(self, ids: Tensor) -> int:
        """Columns, from the first on, in which `ids` (`[B, L]` integers) has the tokens of this history in every row.

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


def join(histories: Sequence[History]) -> History:
    """The rows of several histories of equally many columns, at least one, without padding."""
    joined = History()
    joined.append(torch.cat([history.ids for history in histories]), None)
    return joined
