"""Our selection method: it scores every kept token by a 4-bit copy of its key, along the query's main channels."""

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

CHANNEL_SHARE = 0.5 / 2 + 2 / GROUP  # size of a token's channel, its share of the range included, in 16-bit elements


@dataclass(frozen=True)
class LowBit(SelectionMethod):
    """Score tokens rather than pages: keys in 4 bits tell more than page bounds of the same bytes (docs/lowbit.md).

    Sources: SparQ (arXiv:2312.04985) reads few channels of full keys, KIVI (arXiv:2402.02750) stores low-bit keys per
    channel, and Double Sparsity (arXiv:2408.07092) reads low-bit copies of channels that are fixed in advance.

    Attributes:
        kept_multiple: stage 1 keeps this many times the token budget, >= 1, whatever the length of the text, so that
            the budget pays for enough channels to tell the tokens apart.
        scoring_share: the fraction of the token budget that is spent on scoring, 0 to 1.
    """

    scoring = Scoring.LOWBIT
    kept_multiple: int = 8
    scoring_share: float = 1 / 4

    @classmethod
    def from_config(cls, config: "RocketKVConfig") -> Self:
        """Return the method with larger shares for 8-bit storage, which halves the bytes per token."""
        return cls(12, 1 / 3) if config.kv_dtype == "int8" else cls()

    def kept_tokens(self, seq_len: int, token_budget: int) -> int:
        """Keep a multiple of the budget: more tokens leave each of them fewer channels to score (docs/lowbit.md)."""
        return min(seq_len, self.kept_multiple * token_budget)

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Spend `scoring_share` of the budget, or less if that reads all channels, on scoring; the rest on attending.

        The scoring's share includes the bytes of the spread. A step reads at least one channel, so a step over more
        than `7 * (scoring_share * token_budget - 1) * head_dim` tokens reads more than the budget.
        """
        num_open = min(num_tokens, GROUP - 1)  # the most tokens that the open group can have
        scored = (num_tokens - num_open) * CHANNEL_SHARE + num_open  # in 16-bit elements per channel
        num_channels = min(max(1, int(2 * (self.scoring_share * token_budget - 1) * head_dim / scored)), head_dim)
        scoring = scored * num_channels / (2 * head_dim) + 1  # in tokens with key and value; the spread counts as one
        attended = max(int((1 - self.scoring_share) * token_budget), int(token_budget - scoring))
        return Split(1, num_channels, max(1, attended))

    def build_index(self, working: WorkingSet, page_size: Tensor) -> LowBitIndex:
        """Return the 4-bit copies of all kept keys; see `SelectionMethod`."""
        return LowBitIndex(working.keys_and_values()[0], working.lengths)

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Count, per channel, half a byte per token, two elements per group, one per open token; and the spread."""
        groups = lengths // GROUP * (GROUP // 2 + 2 * element_size)
        return num_channels * (groups + lengths % GROUP * element_size) + SPREAD_BYTES * head_dim
