"""Ours: every kept token scored by a low-bit copy of its key, along the channels that matter most to this query."""

from torch import Tensor

from rocketkv.backends import Scoring
from rocketkv.budget import Split
from rocketkv.cache import WorkingSet
from rocketkv.index import LowBitIndex
from rocketkv.ops import GROUP, lowbit_logits
from rocketkv.selection.base import SPREAD_BYTES, SelectionMethod

CHANNEL_SHARE = 0.5 / 2 + 2 / GROUP  # of a 16-bit element: what one channel of one token takes, its range included


class LowBit(SelectionMethod):
    """Score tokens, not pages: the bytes that page bounds take tell more as 4-bit keys (docs/lowbit.md).

    The idea stands between SparQ (arXiv:2312.04985: few channels of full keys), KIVI (arXiv:2402.02750: low-bit keys
    per channel) and Double Sparsity (arXiv:2408.07092: low-bit copies of channels fixed in advance).

    Args:
        kv_dtype: as in `RocketKVConfig`, which gives it to `selection="lowbit"` but not to an object. Tokens in 8 bits
            take half the memory and traffic, so more of them are worth holding, and scoring may take more.

    Attributes:
        more_held: tokens that stage 1 leaves, times the paper's formula, which suits page bounds: those get poorer the
            more tokens they cover.
        share: of the budget, what scores.
    """

    scoring = Scoring.LOWBIT

    def __init__(self, kv_dtype: str = "auto") -> None:
        self.more_held, self.share = (2.0, 1 / 3) if kv_dtype == "int8" else (1.4, 1 / 4)

    def held_tokens(self, seq_len: int, token_budget: int) -> int:
        """More than the paper's formula says: what stage 1 evicts no index can find (docs/lowbit.md)."""
        return min(seq_len, int(self.more_held * super().held_tokens(seq_len, token_budget)))

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """A share of the budget scores, the spread included, or less where that reads all channels; the rest attends.

        One channel is read at least, so that a step over more than `7 * (share * token_budget - 1) * head_dim` tokens
        reads more than the budget.
        """
        num_open = min(num_tokens, GROUP - 1)  # at most
        scored = (num_tokens - num_open) * CHANNEL_SHARE + num_open  # in keys of 16 bits
        num_channels = min(max(1, int(2 * (self.share * token_budget - 1) * head_dim / scored)), head_dim)
        scoring = scored * num_channels / (2 * head_dim) + 1  # in tokens of keys and values: one is the spread
        attended = max(int((1 - self.share) * token_budget), int(token_budget - scoring))
        return Split(1, num_channels, max(1, attended))

    def build_index(self, working: WorkingSet, page_size: Tensor) -> LowBitIndex:
        """Low-bit copies of all keys; see `SelectionMethod`."""
        return LowBitIndex(working.keys_and_values()[0], working.lengths)

    def logits(self, query: Tensor, working: WorkingSet, num_channels: Tensor, scale: float) -> Tensor:
        """The low-bit key's logit; see `SelectionMethod`."""
        index = working.index
        assert isinstance(index, LowBitIndex)
        return lowbit_logits(
            query,
            index.stored._replace(spread=index.earlier_spread),
            lengths=working.lengths,
            num_tokens=working.max_length,
            num_channels=num_channels,
            scale=scale,
        )

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Half a byte per token and channel, two elements per group, one per open token, and the spread."""
        groups = lengths // GROUP * (GROUP // 2 + 2 * element_size)
        return num_channels * (groups + lengths % GROUP * element_size) + SPREAD_BYTES * head_dim
