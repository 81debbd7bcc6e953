"""Ours: every kept token scored by a low-bit copy of its key, along the query's largest channels."""

from torch import Tensor

from rocketkv.budget import Split
from rocketkv.cache import LowBitIndex, WorkingSet
from rocketkv.ops import GROUP, lowbit_logits
from rocketkv.selection.base import SelectionMethod

CHANNEL_SHARE = 0.5 / 2 + 2 / GROUP  # of a 16-bit element: what one channel of one token takes, its range included


class LowBit(SelectionMethod):
    """Score tokens, not pages: the bytes that page bounds take tell more as 4-bit keys (docs/lowbit.md).

    The idea stands between SparQ (arXiv:2312.04985: few channels of full keys), KIVI (arXiv:2402.02750: low-bit keys
    per channel) and Double Sparsity (arXiv:2408.07092: low-bit copies of channels fixed in advance).
    """

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Half of the budget scores, or less where that reads all channels; the rest attends; see `SelectionMethod`."""
        affordable = int(token_budget * head_dim / (num_tokens * CHANNEL_SHARE))
        num_channels = min(max(1, affordable), head_dim)
        scoring = num_tokens * num_channels * CHANNEL_SHARE / (2 * head_dim)  # in tokens of keys and values
        return Split(1, num_channels, max(1, token_budget // 2, int(token_budget - scoring)))

    def build_index(self, working: WorkingSet, page_size: Tensor) -> LowBitIndex:
        """Low-bit copies of all keys; see `SelectionMethod`."""
        return LowBitIndex(working.keys_and_values()[0], working.lengths)

    def logits(self, query: Tensor, working: WorkingSet, num_channels: Tensor, scale: float) -> Tensor:
        """The low-bit key's logit; see `SelectionMethod`."""
        index = working.index
        assert isinstance(index, LowBitIndex)
        return lowbit_logits(
            query, index.codes, index.ranges, num_tokens=working.max_length, num_channels=num_channels, scale=scale
        )

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Half a byte per token and channel, two elements per group and channel; see `SelectionMethod`."""
        return (lengths + GROUP - 1) // GROUP * num_channels * (GROUP // 2 + 2 * element_size)
