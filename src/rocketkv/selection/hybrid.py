"""RocketKV's stage 2: page bounds read along the query's largest channels, sparse in sequence and head dimension."""

from torch import Tensor

from rocketkv.budget import Split, split_selection
from rocketkv.cache import WorkingSet
from rocketkv.index import PageIndex
from rocketkv.ops import hybrid_logits
from rocketkv.selection.base import SelectionMethod


class Hybrid(SelectionMethod):
    """Score pages by the bound that the query's sign picks, along few channels (section "Hybrid Sparse Attention")."""

    scoring = "hybrid"

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Half of the budget scores, half attends; see `SelectionMethod`."""
        return split_selection(num_tokens, token_budget, head_dim)

    def build_index(self, working: WorkingSet, page_size: Tensor) -> PageIndex:
        """Bounds of every page; see `SelectionMethod`."""
        return PageIndex(working.keys_and_values()[0], working.lengths, page_size)

    def logits(self, query: Tensor, working: WorkingSet, num_channels: Tensor, scale: float) -> Tensor:
        """The page's approximate logit for each of its tokens; see `SelectionMethod`."""
        index = working.index
        assert isinstance(index, PageIndex)
        return hybrid_logits(
            query,
            index.bounds,
            page_size=index.page_size,
            num_tokens=working.max_length,
            num_channels=num_channels,
            scale=scale,
        )

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """One bound per page and chosen channel; see `SelectionMethod`."""
        return (lengths + page_size - 1) // page_size * num_channels * element_size
