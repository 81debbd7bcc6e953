"""No selection: every kept token is attended, so stage 1 alone must meet the budget."""

import sys

from torch import Tensor

from rocketkv.backends import Scoring
from rocketkv.budget import Split
from rocketkv.selection.base import SelectionMethod


class Dense(SelectionMethod):
    """Attend to everything; with `snapkv` eviction this is SnapKV at `token_budget` tokens per KV head."""

    scoring = Scoring.DENSE

    def kept_tokens(self, seq_len: int, token_budget: int) -> int:
        """The budget itself; see `SelectionMethod`."""
        return token_budget

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Nothing is scored; see `SelectionMethod`."""
        return Split(1, head_dim, sys.maxsize)

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Nothing is scored; see `SelectionMethod`."""
        return lengths * 0
