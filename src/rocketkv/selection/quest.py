"""Quest (arXiv:2406.10774): a page's score is the upper bound of its logits, from both bounds along all channels."""

import math

from torch import Tensor

from rocketkv.backends import Scoring
from rocketkv.budget import Split
from rocketkv.cache import WorkingSet
from rocketkv.index import QuestIndex
from rocketkv.selection.hybrid import PublishedHybrid


class Quest(PublishedHybrid):
    """Score pages by their upper bound; both bounds of all channels are read, so pages are larger than hybrid ones."""

    scoring = Scoring.BOUNDS

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Spend half of the budget on scoring, where a page's two bounds cost one token; see `SelectionMethod`."""
        return Split(max(1, math.ceil(2 * num_tokens / token_budget)), head_dim, max(1, token_budget // 2))

    def build_index(self, working: WorkingSet, page_size: Tensor) -> QuestIndex:
        """Return the bounds of every page; see `SelectionMethod`."""
        return QuestIndex(working.keys_and_values()[0], working.lengths, page_size)

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Count both bounds of every page, or one bound if every page has one token; see `SelectionMethod`."""
        per_page = head_dim if bool((page_size == 1).all()) else 2 * head_dim
        return (lengths + page_size - 1) // page_size * per_page * element_size
