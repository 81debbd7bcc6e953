"""Quest (arXiv:2406.10774): an upper bound of each page's logit from its minima and maxima, along all channels."""

import math

from torch import Tensor

from rocketkv.budget import Split, held_tokens
from rocketkv.cache import WorkingSet
from rocketkv.ops import PageBounds


class Quest:
    """Score pages by their upper bound; both bounds of all channels are read, so pages are twice as large as needed."""

    def held_tokens(self, seq_len: int, token_budget: int) -> int:
        """RocketKV's share for stage 1; see `SelectionMethod`."""
        return held_tokens(seq_len, token_budget)

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Half of the budget scores: one page's two bounds cost one token; see `SelectionMethod`."""
        return Split(max(1, math.ceil(2 * num_tokens / token_budget)), head_dim, max(1, token_budget // 2))

    def build_index(self, working: WorkingSet, page_size: Tensor) -> PageBounds:
        """Bounds of every page; see `SelectionMethod`."""
        return PageBounds(working.keys_and_values()[0], working.lengths, page_size)

    def logits(self, query: Tensor, working: WorkingSet, num_channels: Tensor, scale: float) -> Tensor:
        """The page's upper bound for each of its tokens; see `SelectionMethod`."""
        assert isinstance(working.index, PageBounds)
        return working.index.bound_logits(query, num_tokens=working.max_length, scale=scale)

    def scored_elements(self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int) -> Tensor:
        """Both bounds of every page, one if all pages hold one token; see `SelectionMethod`."""
        per_page = head_dim if bool((page_size == 1).all()) else 2 * head_dim
        return (lengths + page_size - 1) // page_size * per_page
