"""Stage 1, which decides after each prefill which tokens stay. A new policy is one file and one entry here."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from rocketkv.eviction.keep_all import KeepAll
from rocketkv.eviction.peak import Peak
from rocketkv.eviction.snapkv import SnapKV
from rocketkv.eviction.streaming_llm import StreamingLLM
from rocketkv.ops import NO_TERMS, LogitTerms

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig


class EvictionPolicy(Protocol):
    """The interface of an eviction policy; any object with this method is one."""

    def keep(
        self,
        query: Tensor,
        keys: Tensor,
        *,
        lengths: Tensor,
        num_queries: Tensor,
        num_tokens: Tensor,
        scale: float,
        terms: LogitTerms = NO_TERMS,
    ) -> Tensor | None:
        """Mark the tokens to keep. Stage 1 calls this method only if some row has more tokens than it may keep.

        Args:
            query: `[B, Hq, T, D]` float, the prompt's queries, right aligned.
            keys: `[B, Hkv, S, D]` float, every key of the row, left aligned, undefined beyond the lengths.
            lengths: `[B, Hkv]` int64, the number of tokens in each row.
            num_queries: `[B]` int64, how many of the T query columns, the last ones, are no padding.
            num_tokens: `[B]` int64, the number of tokens that each row should keep.
            scale: the factor on the dot products.
            terms: the sinks, as `[Hq]` float32, and the soft cap of the layer's attention.

        Returns:
            `[B, Hkv, S]` bool with at least one True per row and head; values beyond the lengths are ignored. None
            keeps every token. Heads may keep different numbers of tokens.
        """
        ...


EVICTION_POLICIES: dict[str, Callable[["RocketKVConfig"], EvictionPolicy]] = {
    "keep_all": KeepAll.from_config,
    "snapkv": SnapKV.from_config,
    "peak": Peak.from_config,
    "streaming_llm": StreamingLLM.from_config,
}

__all__ = [
    "EVICTION_POLICIES",
    "EvictionPolicy",
    "KeepAll",
    "Peak",
    "SnapKV",
    "StreamingLLM",
    "keeps_what_it_may",
]


def keeps_what_it_may(policy: EvictionPolicy) -> bool:
    """Return whether a policy is known to keep `num_tokens` tokens of each row and head, or all where there are fewer.

    A policy of your own is not known to, nor is one that derives from ours and defines `keep`.
    """
    return getattr(policy.keep, "__func__", None) in (SnapKV.keep, StreamingLLM.keep)
