"""Keys and values in 8 bits, in the format MXINT8 of OCP (Microscaling Formats v1.0, 2023).

A block of STEP_CHANNELS consecutive channels of a row shares one step, which is a power of two. A number is its code,
-127 to 127, times the step. A stored number is therefore dequantized without another rounding, in any dtype, and
quantizing the result again gives the same codes.

- Codes are `[B, Hkv, S, D]` int8.
- Exponents of the steps are `[B, Hkv, S, 2 * num_steps(D)]` int8, first those of the key, then those of the value. A
  block with a number that is not finite has the exponent NOT_FINITE, and all of the block is dequantized as NaN.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rocketkv.ops.memory import new_storage

STEP_CHANNELS = 32  # channels that share a step; csrc/kernels.h has the same number
NOT_FINITE = -128
_MOST = 127
_LEAST_EXPONENT = {torch.float16: -24}  # smaller steps are no float16 numbers; other dtypes take 2**-126 and more
_TOKENS_AT_ONCE = 4096  # tokens quantized or dequantized at a time, so that intermediate tensors stay small


def num_steps(head_dim: int) -> int:
    """Return the number of steps of a row of `head_dim` channels."""
    return -(-head_dim // STEP_CHANNELS)


def stored_bytes(head_dim: int) -> int:
    """Return the bytes of one token's stored key and value in one KV head."""
    return 2 * (head_dim + num_steps(head_dim))


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows, `[..., D]` float; return codes `[..., D]` and exponents `[..., num_steps(D)]`, both int8."""
    head_dim, steps = rows.shape[-1], num_steps(rows.shape[-1])
    blocks = torch.nn.functional.pad(rows.float(), (0, steps * STEP_CHANNELS - head_dim))
    blocks = blocks.reshape(*rows.shape[:-1], steps, STEP_CHANNELS)
    raised = blocks.abs().amax(-1).view(torch.int32) >> 23 & 255  # the largest number's exponent in float32, plus 127
    exponents = (raised - (127 + 6)).clamp(min=_LEAST_EXPONENT.get(rows.dtype, -126))
    exponents = exponents.where(raised < 255, NOT_FINITE)
    codes = (blocks / _steps(exponents)[..., None]).nan_to_num(0.0).round().clamp(-_MOST, _MOST)
    return codes.to(torch.int8).flatten(-2)[..., :head_dim], exponents.to(torch.int8)


def dequantize_rows(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows, `[..., D]` in `dtype`, of codes and exponents that `quantize_rows` returned."""
    steps = _steps(exponents).repeat_interleave(STEP_CHANNELS, -1)[..., : codes.shape[-1]]
    return (codes.float() * steps).to(dtype)


def quantize_tokens(
    keys: Tensor, values: Tensor, allocate: Callable[[Tensor, tuple[int, ...], torch.dtype], Tensor] = new_storage
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize keys and values, each `[B, Hkv, S, D]` float.

    Args:
        keys: `[B, Hkv, S, D]` float.
        values: like `keys`.
        allocate: a function that allocates the returned tensors, with the arguments of `new_storage`.

    Returns:
        The codes of the keys, the codes of the values, and the exponents, in the shapes given at the top of this file.
    """
    shape, steps = keys.shape, num_steps(keys.shape[3])
    codes = [allocate(keys, tuple(shape), torch.int8) for _ in range(2)]
    exponents = allocate(keys, (*shape[:3], 2 * steps), torch.int8)
    for start in range(0, shape[2], _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        for rows, stored, own in zip((keys, values), codes, exponents.chunk(2, 3), strict=True):
            stored[:, :, part], own[:, :, part] = quantize_rows(rows[:, :, part])
    return codes[0], codes[1], exponents


def dequantize_tokens(keys: Tensor, values: Tensor, exponents: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keys and values, each `[B, Hkv, S, D]` in `dtype`, of the codes and exponents of `quantize_tokens`."""
    dequantized = [new_storage(keys, keys.shape, dtype) for _ in range(2)]
    for start in range(0, keys.shape[2], _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        for rows, codes, own in zip(dequantized, (keys, values), exponents.chunk(2, 3), strict=True):
            rows[:, :, part] = dequantize_rows(codes[:, :, part], own[:, :, part], dtype)
    return dequantized[0], dequantized[1]


def _steps(exponents: Tensor) -> Tensor:
    """Return the steps as float32; NOT_FINITE gives minus infinity, and its product with the code 0 is NaN."""
    return (exponents.int() + 127 << 23).view(torch.float32)
