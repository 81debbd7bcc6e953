"""Stage 1, once after each prefill: which prompt tokens stay. One policy per file; a new one is a file and an entry."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from rocketkv.eviction.keep_all import KeepAll
from rocketkv.eviction.peak import Peak
from rocketkv.eviction.snapkv import SnapKV
from rocketkv.eviction.streaming_llm import StreamingLLM

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig


class EvictionPolicy(Protocol):
    """What stage 1 asks of a policy; any object with this method will do."""

    def keep(
        self, query: Tensor, keys: Tensor, *, lengths: Tensor, num_queries: Tensor, num_tokens: Tensor, scale: float
    ) -> Tensor | None:
        """Mark the tokens to keep; called only when some row holds more than it may.

        Args:
            query: `[B, Hq, T, D]` float, the prompt's queries, right aligned.
            keys: `[B, Hkv, S, D]` float, every key of the row, left aligned, undefined beyond the lengths.
            lengths: `[B, Hkv]` int64, tokens in each row.
            num_queries: `[B]` int64, how many of the T query columns are real, the last ones.
            num_tokens: `[B]` int64, tokens each row should keep.
            scale: factor on the dot products.

        Returns:
            `[B, Hkv, S]` bool, at least one True per row and head and none beyond the lengths; None keeps everything.
            Heads may keep different numbers.
        """
        ...


EVICTION_POLICIES: dict[str, Callable[["RocketKVConfig"], EvictionPolicy]] = {
    "keep_all": KeepAll.from_config,
    "snapkv": SnapKV.from_config,
    "peak": Peak.from_config,
    "streaming_llm": StreamingLLM.from_config,
}

__all__ = ["EVICTION_POLICIES", "EvictionPolicy", "KeepAll", "Peak", "SnapKV", "StreamingLLM"]
