"""What all backends share: the tensors of a layer that a backend takes, the promises of a step, and common checks."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from rocketkv.errors import InputError
from rocketkv.ops import NO_TERMS, LogitTerms, LowBitKeys, PageBounds

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


class Scoring(StrEnum):
    """The ways in which a decode step can score tokens; csrc/kernels.h has the same names."""

    DENSE = "dense"  # the step scores no token and attends to all
    EXACT = "exact"  # a score is the logit of the whole key
    PAGES = "pages"  # a score is made of one bound of the token's page, along few channels
    BOUNDS = "bounds"  # a score is made of both bounds of the token's page, along all channels
    LOWBIT = "lowbit"  # a score is made of the key in 4 bits, along few channels


class Spec(NamedTuple):
    """The kind of tokens that a backend takes or declines.

    Attributes:
        device: the kind of device, such as `cpu`.
        dtype: the dtype of incoming queries, keys and values.
        head_dim: the number of channels of a key.
        kv_dtype: the name of the format in which keys and values are stored, as in `RocketKVConfig`.
        has_terms: whether sinks share in the softmax, or logits are capped (`LogitTerms`).
        sees_ahead: whether queries attend to tokens after them (`LogitTerms.ahead`).
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    kv_dtype: str = "auto"
    has_terms: bool = False
    sees_ahead: bool = False

    @classmethod
    def of(cls, tokens: Tensor, kv_dtype: str = "auto", terms: LogitTerms = NO_TERMS) -> Self:
        """Return the kind of these tokens, `[..., D]`."""
        has_terms, sees_ahead = not terms.are_none, terms.ahead is not None
        return cls(tokens.device.type, tokens.dtype, tokens.shape[-1], kv_dtype, has_terms, sees_ahead)


def decline_numbers(spec: Spec, *, takes_terms: bool = False) -> str | None:
    """Return why a backend has no kernels for the dtype, the head_dim or the terms; None if it has them.

    Args:
        spec: the kind of the tokens.
        takes_terms: whether the backend's kernels know sinks and soft caps.
    """
    if spec.has_terms and not takes_terms:
        return "it has no kernels for attention sinks and soft-capped logits"
    if spec.sees_ahead:
        return "it has no kernels for queries that attend to tokens after them"
    if spec.dtype not in FLOATS:
        return f"it has no kernels for {spec.dtype}"
    if spec.head_dim > MAX_HEAD_DIM:
        return f"head_dim={spec.head_dim} is more than {MAX_HEAD_DIM}"
    return None


def check_prompt(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lengths: Tensor | None,
    num_queries: Tensor | None,
    scale: float,
    terms: LogitTerms,
) -> None:
    """Raise an InputError where tensors do not fit `ops.prefill_densely`: a kernel reads memory by their numbers."""
    shapes = f"query {list(query.shape)}, keys {list(keys.shape)} and values {list(values.shape)}"
    if not query.dim() == keys.dim() == 4 or keys.shape != values.shape or query.shape[::3] != keys.shape[::3]:
        raise InputError(f"{shapes} do not fit; give query [B, Hq, T, D], and keys and values [B, Hkv, S, D].")
    if keys.shape[1] == 0 or query.shape[1] % keys.shape[1]:
        raise InputError(f"{shapes} do not fit; give Hq as a multiple of Hkv.")
    kinds = [(x.dtype, x.device.type) for x in (query, keys, values)]
    if len({*kinds}) > 1:
        raise InputError(f"query, keys and values are {kinds}; give all in one dtype on one device.")
    if lengths is None and query.shape[2] != keys.shape[2]:
        raise InputError(f"{shapes}: queries and keys differ in number; give lengths, the number of keys of each row.")
    numbers = (("lengths", lengths, keys.shape[:2], keys), ("num_queries", num_queries, query.shape[:1], query))
    for name, given, shape, counted in numbers:
        if given is None:
            continue
        if given.shape != shape or given.dtype != torch.int64 or given.device != keys.device:
            raise InputError(
                f"{name} is {given.dtype} {list(given.shape)} on {given.device}; "
                f"give int64 {list(shape)} on {keys.device}."
            )
        if bool(((given < 0) | (given > counted.shape[2])).any()):
            raise InputError(f"{name}={given.tolist()} must be 0 to {counted.shape[2]}; count no more than there are.")
    sinks = terms.sink_logits
    if sinks is not None and (sinks.shape != query.shape[1:2] or sinks.dtype != torch.float32):
        raise InputError(f"sinks are {sinks.dtype} {list(sinks.shape)}; give float32 [{query.shape[1]}].")
    if not 0 < scale < float("inf"):
        raise InputError(f"scale={scale!r} is no positive, finite number; give one, such as 1 / sqrt(head_dim).")


@dataclass(frozen=True)
class LayerTensors:
    """The buffers and parameters of one layer that stay fixed from token to token.

    A step appends tokens to the buffers, the index included, in place; when a buffer is reallocated, a new step must be
    bound.

    Attributes:
        keys: `[B, Hkv, capacity, D]` in `dtype`, or int8 codes (`ops/int8.py`); undefined beyond the lengths.
        values: like `keys`.
        exponents: `[B, Hkv, capacity, 2 * num_steps(D)]` int8 if keys and values are codes, else None.
        dtype: the dtype of queries, new keys and values, and outputs.
        positions: `[B, Hkv, position_capacity]` int32, the position of each kept token in its row.
        lengths: `[B, Hkv]` int64, the number of kept tokens.
        archive_lengths: `[B, Hkv]` int64, the number of tokens in `keys` if `keys` is an archive, in which `positions`
            are the slots of the kept tokens; None if `keys` has the kept tokens side by side.
        seen: `[B]` int64, the number of tokens seen by each row.
        scoring: the way in which tokens are scored.
        pages: the index of `PAGES` and `BOUNDS`; None with another scoring, or while nothing is to be selected.
        lowbit: the index of `LOWBIT`; None with another scoring, or while nothing is to be selected.
        num_channels: `[B]` int64, 1 to D, the number of channels that scoring reads.
        top_k: `[B]` int64, the number of tokens that a selecting step attends to.
        dense_lengths: `[B]` int64, >= top_k; a row with at most so many kept tokens is attended in full.
        sinks: `[B]` int64, the number of first kept tokens that every step attends to.
        recents: `[B]` int64, the number of last tokens that every step attends to.
        num_heads: the number of query heads, Hq.
        scale: the factor on the dot products.
        terms: the soft cap, and the sinks as `[Hq]` float32.
    """

    keys: Tensor
    values: Tensor
    exponents: Tensor | None
    dtype: torch.dtype
    positions: Tensor
    lengths: Tensor
    archive_lengths: Tensor | None
    seen: Tensor
    scoring: Scoring
    pages: PageBounds | None
    lowbit: LowBitKeys | None
    num_channels: Tensor
    top_k: Tensor
    dense_lengths: Tensor
    sinks: Tensor
    recents: Tensor
    num_heads: int
    scale: float
    terms: LogitTerms = NO_TERMS

    @property
    def index(self) -> tuple[Tensor, ...]:
        """The buffers of the index, to which a step writes; empty while there is no index."""
        if self.pages is not None:
            return (self.pages.bounds,) if self.pages.spread is None else (self.pages.bounds, self.pages.spread)
        return self.lowbit or ()


class Step(Protocol):
    """One decode step of one layer: it appends a token per row, scores, chooses and attends."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None = None
    ) -> tuple[Tensor, int | Tensor]:
        """Append one token per row and attend.

        Args:
            query: `[B, Hq, 1, D]` in the layer's dtype.
            key: `[B, Hkv, 1, D]` in the layer's dtype.
            value: like `key`.
            ranks: an output buffer, `[B, Hkv, position_capacity]` int32, which the step fills with the ranks of the
                tokens attended to, and with -1 after the last; a backend fills in ascending ranks. None asks for none.

        Returns:
            `[B, Hq, 1, D]` in the layer's dtype; and the bytes of keys, values and index that were read: an int, or a
            device tensor whose sum is that number and which the next step overwrites.

        A step accumulates in float32. With keys in 16 bits a backend may round the attention weights to the dtype of
        the values, if it normalises by the sum of the rounded weights.

        For each row and KV head with more kept tokens than its `dense_lengths`, a step reads what the scoring reads and
        `2 * top_k * D` elements of keys and values; for the others it reads `2 * D` elements of each token. In 8 bits
        the elements are codes, and a step reads their exponents, too.
        """
        ...


@runtime_checkable
class ReadingStep(Step, Protocol):
    """A step that can serve further layers; the reference reads in place of one that cannot."""

    def read_again(self, query: Tensor) -> tuple[Tensor, int]:
        """Attend another query, `[B, Hq, 1, D]`, to what the last call left, without appending; see `Step`."""
        ...


class Backend(Protocol):
    """The interface of a backend: a file or folder of this folder, with these names."""

    NAME: str
    DEVICES: tuple[str, ...]  # the kinds of device on which `auto` picks the backend
    SCORINGS: tuple[Scoring, ...]  # the scorings that the backend has kernels for

    def decline(self, spec: Spec) -> str | None:
        """Return why the backend does not accept tokens of this kind; None if it accepts them."""
        ...

    def bind(self, layer: LayerTensors) -> Step:
        """Return a step over the buffers of `layer`, whose tokens and scoring the backend accepts."""
        ...
