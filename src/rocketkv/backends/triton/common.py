"""What all kernels share: how the interpreter is told apart, products and roundings, and the loading of queries."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
CHANNELS = tl.constexpr(32)  # looked at together, so that registers hold them

# Sizes that Triton must not compile in: they change as buffers grow.
UNSPECIALIZED = (
    "token_capacity",
    "position_capacity",
    "num_blocks",
    "num_units",
    "num_parts",
    "num_pieces",
    "most_chosen",
)


@triton.jit
def ordered(numbers):
    """Return float32 numbers >= 0 as uint32 numbers in the same order; NaN is above them all."""
    return numbers.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def product(a, b):
    """Multiply `[M, K]` with `[K, N]`, summed in float32."""
    if INTERPRETED:  # the interpreter takes the bits of bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rounded(numbers, dtype: tl.constexpr):
    """Round float32 numbers to the nearest of another dtype; the interpreter would cut off what bfloat16 lacks."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = numbers.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        numbers = tl.where(numbers == numbers, nearest.to(tl.float32, bitcast=True), numbers)
    return numbers.to(dtype)


@triton.jit
def range_of(least, most, mask):
    """Subtract, along dim 1, the least number that `mask` counts from the largest: float32, 0 of none, NaN stays."""
    low = tl.where(mask, least.to(tl.float32), float("inf"))
    high = tl.where(mask, most.to(tl.float32), -float("inf"))
    is_broken = tl.sum(((low != low) | (high != high)).to(tl.int32), 1) > 0  # minima pass over NaN
    span = tl.max(high, 1) - tl.min(low, 1)
    return tl.where(is_broken, float("nan"), tl.where(span < 0, 0.0, span))


@triton.jit
def load_query(query, head, start, G: tl.constexpr, D: tl.constexpr, G_PAD: tl.constexpr, WIDTH: tl.constexpr):
    """Load `WIDTH` channels, from `start` on, of the queries of a KV head, `[G_PAD, WIDTH]`; zero beyond G and D."""
    group, channel = tl.arange(0, G_PAD), start + tl.arange(0, WIDTH)
    mask = (group[:, None] < G) & (channel[None, :] < D)
    return tl.load(query + (head * G + group[:, None]) * D + channel[None, :], mask=mask, other=0.0)
