"""Exact top-k, the oracle: the best tokens by their true attention, at the price of reading every key."""

from torch import Tensor

from rocketkv.budget import Split, held_tokens
from rocketkv.cache import WorkingSet


class Exact:
    """Choose `token_budget` tokens by true attention. Its scoring is not counted in the budget: it is a bound."""

    def held_tokens(self, seq_len: int, token_budget: int) -> int:
        """RocketKV's share for stage 1; see `SelectionMethod`."""
        return held_tokens(seq_len, token_budget)

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """The whole budget attends; see `SelectionMethod`."""
        return Split(1, head_dim, token_budget)

    def build_index(self, working: WorkingSet, page_size: Tensor) -> None:
        """No index: the keys themselves are scored; see `SelectionMethod`."""
        return

    def logits(self, query: Tensor, working: WorkingSet, num_channels: Tensor, scale: float) -> Tensor:
        """True logits; see `SelectionMethod`."""
        keys, _ = working.keys_and_values()
        return (query.float() @ keys.float().transpose(2, 3)) * scale

    def scored_elements(self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int) -> Tensor:
        """Every channel of every key; see `SelectionMethod`."""
        return lengths * head_dim
