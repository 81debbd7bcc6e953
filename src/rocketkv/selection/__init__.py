"""Stage 2, at every decode step: which kept tokens to attend to. One method per file; a new one: a file, an entry."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from rocketkv.budget import Split
from rocketkv.cache import Index, WorkingSet
from rocketkv.selection.dense import Dense
from rocketkv.selection.exact import Exact
from rocketkv.selection.hybrid import Hybrid
from rocketkv.selection.quest import Quest
from rocketkv.selection.sparq import SparQ


class SelectionMethod(Protocol):
    """What stage 2 asks of a method; any object with these methods will do."""

    def held_tokens(self, seq_len: int, token_budget: int) -> int:
        """How many of `seq_len` tokens stage 1 should leave, so that this method fits in `token_budget`."""
        ...

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Spend `token_budget` on scoring `num_tokens` tokens and attending to the best."""
        ...

    def build_index(self, working: WorkingSet, page_size: Tensor) -> Index | None:
        """Index the kept keys.

        Args:
            working: keys and lengths; keys beyond the lengths are undefined.
            page_size: `[B]` int64, tokens per page.
        """
        ...

    def logits(self, query: Tensor, working: WorkingSet, num_channels: Tensor, scale: float) -> Tensor | None:
        """Estimate the logit of every token of the working set.

        Args:
            query: `[B, Hkv, G, D]` float, the query heads of each KV head.
            working: keys, lengths and the index built by `build_index`.
            num_channels: `[B]` int64, channels to read.
            scale: factor on the dot products.

        Returns:
            `[B, Hkv, G, max_length]` float32, undefined beyond the lengths; None to attend to everything.
        """
        ...

    def scored_elements(self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int) -> Tensor:
        """Elements that `logits` reads for rows of these `lengths` (`[B, Hkv]`), same shape; sizes are `[B, 1]`."""
        ...


SELECTION_METHODS: dict[str, Callable[[], SelectionMethod]] = {
    "dense": Dense,
    "exact": Exact,
    "quest": Quest,
    "sparq": SparQ,
    "hybrid": Hybrid,
}

__all__ = ["SELECTION_METHODS", "Dense", "Exact", "Hybrid", "Quest", "SelectionMethod", "SparQ"]
