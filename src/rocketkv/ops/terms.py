"""What some models put between dot products and weights: a soft cap, attention sinks, images that see themselves."""

from typing import NamedTuple

import torch
from torch import Tensor


class LogitTerms(NamedTuple):
    """The terms of one attention layer beside the scale; most models have none, which is `NO_TERMS`.

    A logit is a dot product times the scale; with a soft cap it becomes `softcap * tanh(logit / softcap)`.
    A sink is a logit more in the softmax of a query head, which takes its part of the weights and has no value.

    Sources: "Gemma 2" (arXiv:2408.00118), section "Logit soft-capping"; "gpt-oss-120b & gpt-oss-20b Model Card"
    (arXiv:2508.10925), section "Attention"; `ahead`: "PaliGemma" (arXiv:2407.07726), section "Architecture", as Gemma 3
    has it within each image.

    Attributes:
        sink_logits: `[Hq]` float, the sink of each query head, which the cap leaves as it is; None: there are no sinks.
        softcap: the soft cap, > 0; None: logits are not capped.
        ahead: `[B, T]` int64, how many of the tokens after it each query of a prompt attends to, beside itself and all
            earlier ones; 0 to T - 1 - t for query t; None: attention is causal.
    """

    sink_logits: Tensor | None = None
    softcap: float | None = None
    ahead: Tensor | None = None

    @property
    def are_none(self) -> bool:
        """Whether a logit is a dot product times the scale, and nothing else shares in the softmax."""
        return self.sink_logits is None and self.softcap is None

    def cap(self, logits: Tensor) -> Tensor:
        """Return the logits, of any shape, as the soft cap leaves them."""
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def softmax(self, logits: Tensor) -> Tensor:
        """Return the weights of capped logits: their softmax, in which each head's sink shares.

        Args:
            logits: `[B, Hq, ..., S]` float.

        Returns:
            The weights in the shape of `logits`; those of a row add up to 1, or to less where there is a sink.
        """
        if self.sink_logits is None:
            return logits.softmax(-1)
        sinks = self.sink_logits.to(logits).view(-1, *[1] * (logits.dim() - 2)).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]

    def of_rows(self, rows: Tensor | slice) -> "LogitTerms":
        """Return the terms of some rows of the batch."""
        return self if self.ahead is None else self._replace(ahead=self.ahead[rows])

    def of_last(self, num_queries: int) -> "LogitTerms":
        """Return the terms of the last queries of a prompt."""
        return self if self.ahead is None else self._replace(ahead=self.ahead[:, -num_queries:].clone())

    def of_group(self, head: int, num_kv_heads: int) -> "LogitTerms":
        """Return the terms of the query heads of one KV head."""
        if self.sink_logits is None:
            return self
        return self._replace(sink_logits=self.sink_logits.view(num_kv_heads, -1)[head])


NO_TERMS = LogitTerms()
