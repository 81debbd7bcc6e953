"""What backends have in common: what they are given, one layer's storage and plan as tensors, and what all decline."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from rocketkv.ops import LowBitKeys, PageBounds

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


class Scoring(StrEnum):
    """How a decode step scores the tokens that it chooses from; csrc/kernels.h has the same names."""

    DENSE = "dense"  # no token is scored: all are attended
    EXACT = "exact"  # by the logits of the whole keys
    PAGES = "pages"  # by one bound of each page, along few channels
    BOUNDS = "bounds"  # by both bounds of each page, along all channels
    LOWBIT = "lowbit"  # by the keys in 4 bits, along few channels


class Spec(NamedTuple):
    """The kind of tokens that a backend takes or declines.

    Attributes:
        device: kind of device, such as `cpu`.
        dtype: the dtype in which queries, keys and values come.
        head_dim: channels of a key.
        kv_dtype: how keys and values are stored, as in `RocketKVConfig`.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    kv_dtype: str = "auto"

    @classmethod
    def of(cls, tokens: Tensor, kv_dtype: str = "auto") -> Self:
        """The kind of these tokens, `[..., D]`."""
        return cls(tokens.device.type, tokens.dtype, tokens.shape[-1], kv_dtype)


def decline_numbers(spec: Spec) -> str | None:
    """Why no backend has kernels for the dtype or the head_dim; None: they have."""
    if spec.dtype not in FLOATS:
        return f"it has no kernels for {spec.dtype}"
    if spec.head_dim > MAX_HEAD_DIM:
        return f"head_dim={spec.head_dim} is more than {MAX_HEAD_DIM}"
    return None


@dataclass(frozen=True)
class LayerTensors:
    """All of a decode step that stays the same while no buffer grows; it writes to what is stored, the index included.

    Attributes:
        keys: `[B, Hkv, capacity, D]` in `dtype`, or codes (`ops/int8.py`); what lies beyond the lengths is undefined.
        values: like `keys`.
        exponents: `[B, Hkv, capacity, 2 * num_steps(D)]` int8 if keys and values are codes, None if not.
        dtype: of queries, new keys and values, and outputs.
        positions: `[B, Hkv, position_capacity]` int32, each token's position in its row.
        lengths: `[B, Hkv]` int64, tokens to choose from.
        archive_lengths: `[B, Hkv]` int64, tokens in `keys` if these are an archive, in which the tokens to choose from
            lie at `positions`; None if they lie side by side.
        seen: `[B]` int64, tokens seen by each row.
        scoring: how tokens are scored.
        pages: the index of `PAGES` and `BOUNDS`; None with another scoring, or while nothing is to be selected.
        lowbit: the index of `LOWBIT`; None as with `pages`.
        num_channels: `[B]` int64.
        top_k: `[B]` int64.
        dense_lengths: `[B]` int64, >= top_k; a row that holds no more is attended in full.
        sinks: `[B]` int64, first tokens always attended.
        recents: `[B]` int64, last tokens always attended.
        num_heads: query heads, Hq.
        scale: factor on the dot products.
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

    @property
    def index(self) -> tuple[Tensor, ...]:
        """The buffers of the index, to which a step writes; none while there is no index."""
        if self.pages is not None:
            return (self.pages.bounds,) if self.pages.spread is None else (self.pages.bounds, self.pages.spread)
        return self.lowbit or ()


class Step(Protocol):
    """One decode step of one layer: append, score, choose and attend at once."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None = None
    ) -> tuple[Tensor, int | Tensor]:
        """Take in one token per row and attend.

        Args:
            query: `[B, Hq, 1, D]` in the layer's dtype.
            key: `[B, Hkv, 1, D]`, likewise.
            value: like `key`.
            ranks: `[B, Hkv, position_capacity]` int32, filled with the ranks of the tokens attended to, -1 after the
                last; a backend fills in ascending order. None: not asked for.

        Returns:
            `[B, Hq, 1, D]`, and the bytes of keys, values and index that were read, or numbers on the device whose sum
            they are and which the next step overwrites.

        Accumulates in float32. With keys in 16 bits a backend may round the weights of the values to their dtype, if it
        normalises by the sum of the rounded ones.

        Reads, for each row and KV head that holds more than its `dense_lengths`, what its scoring reads and
        `2 * top_k * D` elements; for others, `2 * D` for each token; of codes and exponents, if these are stored.
        """
        ...


class Backend(Protocol):
    """A file of this folder."""

    NAME: str
    DEVICES: tuple[str, ...]  # kinds of device on which `auto` picks it
    SCORINGS: tuple[Scoring, ...]  # that it knows

    def decline(self, spec: Spec) -> str | None:
        """Why tokens of this kind are not for the backend; None: they are."""
        ...

    def bind(self, layer: LayerTensors) -> Step:
        """A step over this storage, whose tokens the backend does not decline and whose scoring it knows."""
        ...
