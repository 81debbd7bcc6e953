"""The eviction policy that evicts nothing."""

from typing import TYPE_CHECKING, Self

from torch import Tensor

from rocketkv.ops import NO_TERMS, LogitTerms

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig


class KeepAll:
    """Keep every token; with `dense` selection this is the full cache."""

    @classmethod
    def from_config(cls, config: "RocketKVConfig") -> Self:
        """Return the policy with the options of this configuration."""
        return cls()

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
        """Keep every token; see `EvictionPolicy.keep`."""
        return None
