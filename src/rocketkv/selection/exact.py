"""Exact top-k, the oracle: it chooses the best tokens by their true attention, and reads every key to do so."""

from torch import Tensor

from rocketkv.backends import Scoring
from rocketkv.budget import Split
from rocketkv.cache import WorkingSet
from rocketkv.selection.base import SelectionMethod


class Exact(SelectionMethod):
    """Choose `token_budget` tokens by their true attention.

    The budget does not count the scoring, because the method serves as an upper bound on what selection can reach.
    """

    scoring = Scoring.EXACT

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Spend the whole budget on attending; see `SelectionMethod`."""
        return Split(1, head_dim, token_budget)

    def logits(self, query: Tensor, working: WorkingSet, num_channels: Tensor, scale: float) -> Tensor:
        """Return the true logits; see `SelectionMethod`."""
        keys, _ = working.keys_and_values()
        return (query.float() @ keys.float().transpose(2, 3)) * scale

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Count every channel of every key; see `SelectionMethod`."""
        return lengths * head_dim * element_size
