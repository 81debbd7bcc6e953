"""StreamingLLM (arXiv:2309.17453): keep the first tokens, the attention sinks, and the most recent ones."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from rocketkv.ops import NO_TERMS, LogitTerms

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig


@dataclass(frozen=True)
class StreamingLLM:
    """Keep tokens by position alone.

    Attributes:
        num_sinks: the number of first tokens that stay, >= 0; it is 4 in the paper (section "Rolling KV Cache with
            Attention Sinks").
    """

    num_sinks: int = 4

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
        """Keep the sinks and the most recent tokens; see `EvictionPolicy.keep`."""
        slots = torch.arange(keys.shape[2], device=keys.device)
        num_sinks = (num_tokens - 1).clamp(max=self.num_sinks)  # [B], the newest token always stays
        first_recent = lengths - (num_tokens - num_sinks)[:, None]  # [B, Hkv]
        is_recent = (slots >= first_recent[..., None]) & (slots < lengths[..., None])
        is_sink = slots < lengths.minimum(num_sinks[:, None])[..., None]
        return is_recent | is_sink
