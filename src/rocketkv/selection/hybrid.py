"""RocketKV's stage 2: page bounds, read along few channels, which are chosen in our way or in the published one."""

from typing import ClassVar

from torch import Tensor

from rocketkv import paper
from rocketkv.backends import Scoring
from rocketkv.budget import Split
from rocketkv.cache import WorkingSet
from rocketkv.index import PageIndex
from rocketkv.selection.base import SPREAD_BYTES, SelectionMethod


class Hybrid(SelectionMethod):
    """Score pages by the bound that the query's sign picks, along few channels.

    Source: RocketKV (arXiv:2502.14051), section "Hybrid Sparse Attention".

    Attributes:
        weighted: True chooses channels by |q| times the spread of their keys; False by |q| alone, as published.
    """

    scoring = Scoring.PAGES
    weighted: ClassVar[bool] = True

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Spend half of the budget on scoring and half on attending, less one token for the spread's bytes."""
        split = paper.split_selection(num_tokens, token_budget, head_dim)
        return split._replace(top_k=max(1, split.top_k - 1)) if self.weighted else split

    def build_index(self, working: WorkingSet, page_size: Tensor) -> PageIndex:
        """Return the bounds of every page; see `SelectionMethod`."""
        return PageIndex(working.keys_and_values()[0], working.lengths, page_size, weighted=self.weighted)

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Count one bound per page and chosen channel, and the spread; see `SelectionMethod`."""
        bounds = (lengths + page_size - 1) // page_size * num_channels * element_size
        return bounds + SPREAD_BYTES * head_dim if self.weighted else bounds


class PublishedHybrid(Hybrid):
    """Hybrid selection as published, which chooses channels by |q| alone."""

    weighted = False
