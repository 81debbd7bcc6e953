"""No eviction: every token stays."""

from torch import Tensor


class KeepAll:
    """Keep every token; with `dense` selection this is the full cache."""

    def keep(
        self, query: Tensor, keys: Tensor, *, lengths: Tensor, num_queries: Tensor, num_tokens: Tensor, scale: float
    ) -> Tensor | None:
        """Keep everything; see `EvictionPolicy.keep`."""
        return None
