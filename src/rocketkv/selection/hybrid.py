"""RocketKV's stage 2: page bounds read along few channels. Ours and, by another choice of channels, as published."""

from typing import ClassVar

from torch import Tensor

from rocketkv import paper
from rocketkv.backends import Scoring
from rocketkv.budget import Split
from rocketkv.cache import WorkingSet
from rocketkv.index import PageIndex
from rocketkv.selection.base import SPREAD_BYTES, SelectionMethod


class Hybrid(SelectionMethod):
    """Score pages by the bound that the query's sign picks, along few channels (section "Hybrid Sparse Attention").

    Attributes:
        weighted: whether channels are chosen by |q| times the spread of their keys; False: by |q| alone, as published.
    """

    scoring = Scoring.PAGES
    weighted: ClassVar[bool] = True

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Half of the budget scores, half attends, less one token that the spread takes; see `SelectionMethod`."""
        split = paper.split_selection(num_tokens, token_budget, head_dim)
        return split._replace(top_k=max(1, split.top_k - 1)) if self.weighted else split

    def build_index(self, working: WorkingSet, page_size: Tensor) -> PageIndex:
        """Bounds of every page; see `SelectionMethod`."""
        return PageIndex(working.keys_and_values()[0], working.lengths, page_size, weighted=self.weighted)

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """One bound per page and chosen channel, and the spread; see `SelectionMethod`."""
        bounds = (lengths + page_size - 1) // page_size * num_channels * element_size
        return bounds + SPREAD_BYTES * head_dim if self.weighted else bounds


class PublishedHybrid(Hybrid):
    """Hybrid selection as published: channels by |q| alone."""

    weighted = False
