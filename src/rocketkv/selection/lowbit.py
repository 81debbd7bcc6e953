"""Ours: every kept token scored by a low-bit copy of its key, along the query's largest channels."""

from torch import Tensor

from rocketkv.budget import Split
from rocketkv.cache import WorkingSet
from rocketkv.index import LowBitIndex
from rocketkv.ops import GROUP, lowbit_logits
from rocketkv.selection.base import SelectionMethod

MORE_HELD = 1.4  # times the paper's formula, which suits page bounds: those get poorer the more tokens they cover
CHANNEL_SHARE = 0.5 / 2 + 2 / GROUP  # of a 16-bit element: what one channel of one token takes, its range included


class LowBit(SelectionMethod):
    """Score tokens, not pages: the bytes that page bounds take tell more as 4-bit keys (docs/lowbit.md).

    The idea stands between SparQ (arXiv:2312.04985: few channels of full keys), KIVI (arXiv:2402.02750: low-bit keys
    per channel) and Double Sparsity (arXiv:2408.07092: low-bit copies of channels fixed in advance).
    """

    scoring = "lowbit"

    def held_tokens(self, seq_len: int, token_budget: int) -> int:
        """More than the paper's formula says: what stage 1 evicts no index can find (docs/lowbit.md)."""
        return min(seq_len, int(MORE_HELD * super().held_tokens(seq_len, token_budget)))

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """A quarter of the budget scores, or less where that reads all channels; the rest attends (docs/lowbit.md).

        One channel is read at least, so that a step over more than `1.8 * token_budget * head_dim` tokens reads more
        than the budget.
        """
        num_open = min(num_tokens, GROUP - 1)  # at most
        scored = (num_tokens - num_open) * CHANNEL_SHARE + num_open  # in keys of 16 bits
        num_channels = min(max(1, int(token_budget * head_dim / (2 * scored))), head_dim)
        scoring = scored * num_channels / (2 * head_dim)  # in tokens of keys and values
        return Split(1, num_channels, max(1, 3 * token_budget // 4, int(token_budget - scoring)))

    def build_index(self, working: WorkingSet, page_size: Tensor) -> LowBitIndex:
        """Low-bit copies of all keys; see `SelectionMethod`."""
        return LowBitIndex(working.keys_and_values()[0], working.lengths)

    def logits(self, query: Tensor, working: WorkingSet, num_channels: Tensor, scale: float) -> Tensor:
        """The low-bit key's logit; see `SelectionMethod`."""
        index = working.index
        assert isinstance(index, LowBitIndex)
        return lowbit_logits(
            query,
            index.stored,
            lengths=working.lengths,
            num_tokens=working.max_length,
            num_channels=num_channels,
            scale=scale,
        )

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Half a byte per token and channel, two elements per group, one per open token; see `SelectionMethod`."""
        groups = lengths // GROUP * (GROUP // 2 + 2 * element_size)
        return num_channels * (groups + lengths % GROUP * element_size)
