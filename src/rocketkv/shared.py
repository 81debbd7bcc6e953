"""Further layers of a model that attend to the keys and values of one layer, with queries of their own.

The layer that owns the cache attends first. Stage 1 keeps what the owner's queries looked at, for all of its readers;
stage 2 chooses for each reader by the reader's own queries. A reader appends nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rocketkv import backends
from rocketkv.checks import check_terms
from rocketkv.errors import InputError, UnsupportedError
from rocketkv.exclusive import exclusive
from rocketkv.ops import NO_TERMS, LogitTerms
from rocketkv.state import LayerState


class Prompt(NamedTuple):
    """What the last prefill attended to, before stage 1 kept some of it."""

    keys: Tensor  # [B, Hkv, S, D], left aligned
    values: Tensor  # like keys
    lengths: Tensor  # [B, Hkv] int64 on the host
    num_queries: Tensor  # [B] int64, how many of the prompt's columns, the last ones, are no padding


class SharedReads(LayerState):
    """The part of a `LayerCache` that serves further layers of the model.

    Attributes:
        keeps_prompt: True lets a prefill leave its `prompt` for `read_prompt`.
        prompt: what the last prefill attended to; None if it was not kept. Set it to None to free the memory.
    """

    keeps_prompt = False
    prompt: Prompt | None = None

    @exclusive
    def read_prompt(self, query: Tensor, *, scale: float | None = None, terms: LogitTerms = NO_TERMS) -> Tensor:
        """Attend further queries of the last prefill's tokens to all that the prefill attended to, exactly.

        Args:
            query: `[B, Hq, T, D]` float, after RoPE, for the last T columns of the prompt.
            scale: the factor on the dot products, > 0; None means 1 / sqrt(D).
            terms: the attention sinks and the soft cap of the reading layer.

        Returns:
            `[B, Hq, T, D]` in the dtype of `query`, zero in padded columns.

        Raises:
            InputError: no prompt was kept, or shapes, dtypes, devices, scale or terms do not fit.
            UnsupportedError: the query requires gradients.
        """
        if self.prompt is None:
            raise InputError("no prompt was kept; set keeps_prompt before the prefill, and read before the next call.")
        keys, values, lengths, counts = self.prompt
        self._check_query(query)
        scale, terms = check_terms(scale, terms, query)
        counts = counts.clamp(max=query.shape[2])
        return backends.prefill_densely(
            query, keys, values, lengths=lengths, num_queries=counts, scale=scale, terms=terms
        )

    @exclusive
    def read_token(self, query: Tensor, *, scale: float | None = None, terms: LogitTerms = NO_TERMS) -> Tensor:
        """Attend another query of the token that was decoded last to the best kept tokens, that token included.

        Args:
            query: `[B, Hq, 1, D]` float, after RoPE, with as many heads as those of the layer that owns the cache.
            scale: the factor on the dot products, as in the last `decode`.
            terms: the attention sinks and the soft cap, as in the last `decode`.

        Returns:
            `[B, Hq, 1, D]` in the dtype of `query`.

        Raises:
            InputError: nothing was decoded since the last prefill, or shapes, dtypes, devices, scale or terms differ
                from those of the last `decode`.
            UnsupportedError: the query requires gradients.
        """
        self._check_query(query)
        factor, checked = check_terms(scale, terms, query)
        output, read_bytes = self._decoder.read_again(query, factor, checked)
        self._read_bytes, self._num_reads = self._read_bytes + read_bytes, self._num_reads + 1
        return output

    def _check_query(self, query: Tensor) -> None:
        """Refuse a query that does not fit the tokens of this cache."""
        like = self._started().like
        own = [like.shape[0], f"a multiple of {like.shape[1]}", "T", like.shape[3]]
        fits = isinstance(query, Tensor) and query.dim() == 4 and 0 not in query.shape
        if not fits or query.shape[::3] != like.shape[::3] or query.shape[1] % like.shape[1]:
            shape = list(query.shape) if isinstance(query, Tensor) else query
            raise InputError(f"query {shape} does not fit this cache; give [{', '.join(map(str, own))}].")
        if (query.dtype, query.device) != (like.dtype, like.device):
            raise InputError(
                f"query is {query.dtype} on {query.device}, but the cache has {like.dtype} on {like.device}; give that."
            )
        if torch.is_grad_enabled() and query.requires_grad:
            raise UnsupportedError("a compressed cache has no gradients; run under torch.inference_mode().")
