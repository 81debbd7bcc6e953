"""No eviction: every token stays."""

from typing import TYPE_CHECKING, Self

from torch import Tensor

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig


class KeepAll:
    """Keep every token; with `dense` selection this is the full cache."""

    @classmethod
    def from_config(cls, config: "RocketKVConfig") -> Self:
        """The policy as this configuration asks for it."""
        return cls()

    def keep(
        self, query: Tensor, keys: Tensor, *, lengths: Tensor, num_queries: Tensor, num_tokens: Tensor, scale: float
    ) -> Tensor | None:
        """Keep everything; see `EvictionPolicy.keep`."""
        return None
