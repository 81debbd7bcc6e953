"""Ours: every kept token scored by a low-bit copy of its key, along the channels that matter most to this query."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from torch import Tensor

from rocketkv.backends import Scoring
from rocketkv.budget import Split
from rocketkv.cache import WorkingSet
from rocketkv.index import LowBitIndex
from rocketkv.ops import GROUP
from rocketkv.selection.base import SPREAD_BYTES, SelectionMethod

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig

CHANNEL_SHARE = 0.5 / 2 + 2 / GROUP  # of a 16-bit element: what one channel of one token takes, its range included


@dataclass(frozen=True)
class LowBit(SelectionMethod):
    """Score tokens, not pages: the bytes that page bounds take tell more as 4-bit keys (docs/lowbit.md).

    The idea stands between SparQ (arXiv:2312.04985: few channels of full keys), KIVI (arXiv:2402.02750: low-bit keys
    per channel) and Double Sparsity (arXiv:2408.07092: low-bit copies of channels fixed in advance).

    Attributes:
        kept_factor: stage 1 keeps this multiple of the paper's number of tokens, >= 1. The paper's number suits page
            bounds, which get poorer the more tokens they cover.
        scoring_share: fraction of the token budget that is spent on scoring, 0 to 1.
    """

    scoring = Scoring.LOWBIT
    kept_factor: float = 1.4
    scoring_share: float = 1 / 4

    @classmethod
    def from_config(cls, config: "RocketKVConfig") -> Self:
        """With half the bytes per token, more tokens are worth keeping and scoring may take more."""
        return cls(2.0, 1 / 3) if config.kv_dtype == "int8" else cls()

    def kept_tokens(self, seq_len: int, token_budget: int) -> int:
        """More than the paper's formula says: what stage 1 evicts no index can find (docs/lowbit.md)."""
        return min(seq_len, int(self.kept_factor * super().kept_tokens(seq_len, token_budget)))

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """A share of the budget scores, the spread included, or less where that reads all channels; the rest attends.

        One channel is read at least, so that a step over more than
        `7 * (scoring_share * token_budget - 1) * head_dim` tokens reads more than the budget.
        """
        num_open = min(num_tokens, GROUP - 1)  # at most
        scored = (num_tokens - num_open) * CHANNEL_SHARE + num_open  # in keys of 16 bits
        num_channels = min(max(1, int(2 * (self.scoring_share * token_budget - 1) * head_dim / scored)), head_dim)
        scoring = scored * num_channels / (2 * head_dim) + 1  # in tokens of keys and values: one is the spread
        attended = max(int((1 - self.scoring_share) * token_budget), int(token_budget - scoring))
        return Split(1, num_channels, max(1, attended))

    def build_index(self, working: WorkingSet, page_size: Tensor) -> LowBitIndex:
        """Low-bit copies of all keys; see `SelectionMethod`."""
        return LowBitIndex(working.keys_and_values()[0], working.lengths)

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Half a byte per token and channel, two elements per group, one per open token, and the spread."""
        groups = lengths // GROUP * (GROUP // 2 + 2 * element_size)
        return num_channels * (groups + lengths % GROUP * element_size) + SPREAD_BYTES * head_dim
