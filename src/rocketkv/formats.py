"""The formats in which keys and values are stored. A new format is one class and one entry in `FORMATS`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rocketkv.backends import new_storage
from rocketkv.ops import dequantize_tokens, quantize_tokens, stored_bytes

Fields = dict[str, Tensor]  # the arrays of some tokens, each `[B, Hkv, S, ...]`, by name


class Format(ABC):
    """A way to store keys and values, each `[B, Hkv, S, D]` float, as fields.

    Attributes:
        name: the `kv_dtype` of `RocketKVConfig` that stands for this format.
        is_exact: True if `load` returns the bits that were given to `store`.
        least_share: a stored token's least bytes as a fraction of its bytes in 16 bits, 0 to 1.
    """

    name: ClassVar[str]
    is_exact: ClassVar[bool]
    least_share: ClassVar[float]

    @abstractmethod
    def store(self, keys: Tensor, values: Tensor) -> Fields:
        """Return the fields of these tokens."""

    @abstractmethod
    def load(self, fields: Fields, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values of stored tokens, each `[B, Hkv, S, D]` in `dtype`, the dtype in which they came."""

    @abstractmethod
    def token_bytes(self, head_dim: int, element_size: int) -> int:
        """Return the bytes of a token's stored key and value in one KV head; as given, a channel has `element_size`."""

    def affordable(self, num_tokens: int, head_dim: int) -> int:
        """Return how many stored tokens take as many bytes as `num_tokens` tokens in 16 bits, which a budget counts."""
        return num_tokens


@dataclass(frozen=True)
class Native(Format):
    """This format stores keys and values as they come."""

    name = "auto"
    is_exact = True
    least_share = 1.0

    def store(self, keys: Tensor, values: Tensor) -> Fields:
        """See `Format`."""
        return {"keys": keys, "values": values}

    def load(self, fields: Fields, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        return fields["keys"], fields["values"]

    def token_bytes(self, head_dim: int, element_size: int) -> int:
        """See `Format`."""
        return 2 * head_dim * element_size


@dataclass(frozen=True)
class Int8(Format):
    """This format stores 8-bit codes and the exponents of their scales (`ops/int8.py`)."""

    name = "int8"
    is_exact = False
    least_share = 0.5

    def store(self, keys: Tensor, values: Tensor) -> Fields:
        """See `Format`."""
        keys, values, exponents = quantize_tokens(keys, values, new_storage)
        return {"keys": keys, "values": values, "exponents": exponents}

    def load(self, fields: Fields, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        return dequantize_tokens(fields["keys"], fields["values"], fields["exponents"], dtype)

    def token_bytes(self, head_dim: int, element_size: int) -> int:
        """See `Format`."""
        return stored_bytes(head_dim)

    def affordable(self, num_tokens: int, head_dim: int) -> int:
        """See `Format`."""
        return num_tokens * 4 * head_dim // stored_bytes(head_dim)


FORMATS: dict[str, Format] = {format.name: format for format in (Native(), Int8())}
