"""SnapKV (arXiv:2404.14469) as RocketKV uses it: each KV head keeps the tokens that the prompt's end attends to."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from rocketkv.backends import score_window
from rocketkv.ops import NO_TERMS, LogitTerms, topk_mask

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig


@dataclass(frozen=True)
class SnapKV:
    """Score tokens by the attention of the last queries, smooth by max-pooling, keep the best and the window itself.

    Source: SnapKV, and RocketKV (arXiv:2502.14051), section "SnapKV with GQA support".

    Attributes:
        window_size: the number of last prompt tokens that vote and always stay, >= 1.
        kernel_size: the width, in tokens, of the max-pooling over the sequence, odd, >= 1.
        by_peak: True scores a token by its largest attention weight, False by the sum of the weights of all queries.
    """

    by_peak: ClassVar[bool] = False
    window_size: int
    kernel_size: int

    @classmethod
    def from_config(cls, config: "RocketKVConfig") -> Self:
        """Return the policy with the options of this configuration."""
        return cls(config.window_size, config.kernel_size)

    @property
    def reach(self) -> tuple[int, int]:
        """The number of tokens before a token, and after it, that the max-pooling gives that token's score."""
        return self.kernel_size // 2, self.kernel_size // 2

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
        """Keep the window and the best tokens before it; see `EvictionPolicy.keep`."""
        window = num_queries.clamp(max=self.window_size)  # [B]
        last = query[:, :, -self.window_size :]
        scores = score_window(
            last, keys, lengths=lengths, num_queries=window, scale=scale, terms=terms, by_peak=self.by_peak
        )
        before = (lengths - window[:, None]).clamp(min=0)  # [B, Hkv], the number of tokens before the window
        slots = torch.arange(keys.shape[2], device=keys.device)
        scores = scores.masked_fill(slots >= before[..., None], 0.0)
        back, forward = self.reach
        scores = max_pool1d(pad(scores, (forward, back)), back + 1 + forward, stride=1)
        stays = window.minimum(num_tokens)  # if the row may keep fewer tokens than the window, the window's end stays
        in_window = (slots >= (lengths - stays[:, None])[..., None]) & (slots < lengths[..., None])
        return topk_mask(scores, candidates=before, num_tokens=num_tokens - stays) | in_window
