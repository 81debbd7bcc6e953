"""Keys and values in 8 bits on the device; ops/int8.py specifies the format and describes codes and exponents."""

import triton
import triton.language as tl

from rocketkv.backends.triton.common import ordered
from rocketkv.ops import int8

STEP_CHANNELS = tl.constexpr(int8.STEP_CHANNELS)
NOT_FINITE = tl.constexpr(int8.NOT_FINITE)
num_steps = triton.constexpr_function(int8.num_steps)  # Triton evaluates the function while it compiles


@triton.jit
def store_in_8_bits(codes, exponents, row, D: tl.constexpr, D_PAD: tl.constexpr):
    """Quantize and store a row, `[D_PAD]`, zero beyond D, as `quantize_rows` does; return the row dequantized."""
    WIDTH: tl.constexpr = min(D_PAD, STEP_CHANNELS)
    least: tl.constexpr = -24 if row.dtype == tl.float16 else -126
    blocks = row.to(tl.float32).reshape(D_PAD // WIDTH, WIDTH)
    raised = (tl.max(ordered(blocks), 1) >> 23).to(tl.int32)
    exponent = tl.where(raised == 255, NOT_FINITE, tl.maximum(raised - (127 + 6), least))
    step = tl.broadcast_to(_step(exponent)[:, None], blocks.shape)
    code = tl.minimum(tl.maximum(tl.div_rn(blocks, step), -127.0), 127.0)
    code = tl.where((raised == 255)[:, None], 0.0, (code + 12582912.0) - 12582912.0)  # adding 1.5 * 2**23 rounds
    channel, block = tl.arange(0, D_PAD), tl.arange(0, D_PAD // WIDTH)
    tl.store(codes + channel, code.to(tl.int8).reshape(D_PAD), mask=channel < D)
    tl.store(exponents + block, exponent.to(tl.int8), mask=block * WIDTH < D)
    return (code * step).to(row.dtype).reshape(D_PAD)


@triton.jit
def load_rows(
    rows, offsets, exponents, slots, is_token, first, D: tl.constexpr, D_PAD: tl.constexpr, dtype: tl.constexpr
):
    """Load the keys or the values of some tokens, `[TILE, D_PAD]` in `dtype`, zero beyond D.

    `offsets`, `[TILE, D_PAD]`, are the places of the numbers in `rows`. With `exponents` the numbers are codes of the
    tokens at `slots`, `[TILE]`, and `first` is the place of a row's first exponent among the exponents of its token.
    """
    mask = is_token[:, None] & (tl.arange(0, D_PAD) < D)[None, :]
    tile = tl.load(rows + offsets, mask=mask, other=0)
    if exponents is not None:
        at = exponents + (slots * (2 * num_steps(D)) + first)[:, None] + (tl.arange(0, D_PAD) // STEP_CHANNELS)[None, :]
        tile = (tile.to(tl.float32) * _step(tl.load(at, mask=mask, other=0))).to(dtype)
    return tile


@triton.jit
def _step(exponents):
    """Raise two to the power of these exponents, float32; minus infinity for NOT_FINITE."""
    return ((exponents.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
