"""The selection method that chooses every kept token, so that stage 1 alone must meet the budget."""

import sys

from torch import Tensor

from rocketkv.backends import Scoring
from rocketkv.budget import Split
from rocketkv.selection.base import SelectionMethod


class Dense(SelectionMethod):
    """Attend to every kept token; with `snapkv` eviction this is SnapKV at `token_budget` tokens per KV head."""

    scoring = Scoring.DENSE

    def kept_tokens(self, seq_len: int, token_budget: int) -> int:
        """Keep as many tokens as the budget has; see `SelectionMethod`."""
        return token_budget

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Let a step score nothing and attend to every token; see `SelectionMethod`."""
        return Split(1, head_dim, sys.maxsize)

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Return 0, as nothing is scored; see `SelectionMethod`."""
        return lengths * 0
