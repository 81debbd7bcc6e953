"""Random attention inputs in which selection matters: outlier channels, and queries that resemble some keys."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIZES = [(1, 1, 64), (63, 3, 80), (100, 4, 96), (257, 8, 128), (130, 2, 256)]  # S, G, D


class Inputs(NamedTuple):
    query: Tensor  # [B, Hq, T, D]
    key: Tensor  # [B, Hkv, T, D]
    value: Tensor  # [B, Hkv, T, D]

    def part(self, start: int, stop: int) -> "Inputs":
        return Inputs(*(x[:, :, start:stop] for x in self))

    def row(self, row: int, start: int = 0) -> "Inputs":
        return Inputs(*(x[row : row + 1, :, start:] for x in self))


def make_inputs(
    generator: torch.Generator,
    batch: int = 1,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    num_tokens: int = 200,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    scale = torch.ones(head_dim)
    scale[torch.randperm(head_dim, generator=generator)[: max(2, head_dim // 16)]] = 4.0

    def normal(heads: int) -> Tensor:
        return torch.randn(batch, heads, num_tokens, head_dim, generator=generator)

    key, value = normal(num_kv_heads) * scale * 0.5, normal(num_kv_heads)
    source = torch.randint(num_tokens, (num_tokens,), generator=generator)
    echo = key[:, :, source].repeat_interleave(num_heads // num_kv_heads, dim=1)
    query = normal(num_heads) * scale * 0.5 + 0.6 * echo
    return Inputs(query.to(dtype), key.to(dtype), value.to(dtype))


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [x.double().numpy() for x in tensors]


def poisoned(tokens: Tensor, lengths: Tensor) -> Tensor:
    """A copy of `tokens` [B, Hkv, S, D] with NaN beyond the lengths and spare room at the end."""
    spare = torch.cat([tokens, torch.zeros_like(tokens[:, :, :5])], dim=2)
    beyond = torch.arange(spare.shape[2]) >= lengths[..., None]
    return spare.masked_fill(beyond[..., None], torch.nan)
