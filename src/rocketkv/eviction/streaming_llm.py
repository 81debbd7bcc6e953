"""StreamingLLM (arXiv:2309.17453): keep the first tokens, the attention sinks, and the most recent ones."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StreamingLLM:
    """Keep by position alone.

    Attributes:
        num_sinks: first tokens kept, >= 0; 4 in the paper (section "Rolling KV Cache with Attention Sinks").
    """

    num_sinks: int = 4

    def keep(
        self, query: Tensor, keys: Tensor, *, lengths: Tensor, num_queries: Tensor, num_tokens: Tensor, scale: float
    ) -> Tensor | None:
        """Keep the sinks and the most recent tokens; see `EvictionPolicy.keep`."""
        slots = torch.arange(keys.shape[2], device=keys.device)
        first_recent = lengths - (num_tokens[:, None] - self.num_sinks).clamp(min=1)  # [B, Hkv]
        is_recent = (slots >= first_recent[..., None]) & (slots < lengths[..., None])
        return is_recent | (slots < lengths.clamp(max=self.num_sinks)[..., None])
