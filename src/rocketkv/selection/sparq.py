"""SparQ (arXiv:2312.04985): a token's score is its logit along the query's largest channels."""

import torch
from torch import Tensor

from rocketkv.backends import Scoring
from rocketkv.budget import Split
from rocketkv.cache import WorkingSet
from rocketkv.index import PageIndex
from rocketkv.selection.hybrid import PublishedHybrid


class SparQ(PublishedHybrid):
    """Hybrid selection with pages of one token, whose bounds are the keys themselves, stored channel-major."""

    scoring = Scoring.PAGES

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Spend half of the budget on scoring, along few channels; see `SelectionMethod`."""
        num_channels = max(1, int(head_dim * token_budget / max(num_tokens, token_budget)))
        return Split(1, num_channels, max(1, token_budget // 2))

    def build_index(self, working: WorkingSet, page_size: Tensor) -> PageIndex:
        """Return a channel-major copy of the keys; see `SelectionMethod`."""
        return super().build_index(working, torch.ones_like(page_size))

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Count the chosen channels of every token; see `SelectionMethod`."""
        return lengths * num_channels * element_size
