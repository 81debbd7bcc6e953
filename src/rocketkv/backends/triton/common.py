"""What all kernels share: the test for the interpreter, products, roundings, and the loading of queries."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
CHANNELS = tl.constexpr(32)  # channels that a kernel handles at a time, so that they fit in registers

# These sizes change as buffers grow, so Triton must not compile their values in.
UNSPECIALIZED = (
    "token_capacity",
    "position_capacity",
    "num_blocks",
    "num_units",
    "num_parts",
    "parts_per_program",
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
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def capped(logits, softcap):
    """Return the logits as a soft cap leaves them; the rational function is that of Eigen's tanh of floats."""
    x = logits / softcap
    x = tl.where(x > 7.90531110763549805, 7.90531110763549805, x)  # from here on the function is 1; NaN stays
    x = tl.where(x < -7.90531110763549805, -7.90531110763549805, x)
    squared = x * x
    p = -2.76076847742355e-16 * squared + 2.00018790482477e-13
    p = p * squared - 8.60467152213735e-11
    p = p * squared + 5.12229709037114e-08
    p = p * squared + 1.48572235717979e-05
    p = p * squared + 6.37261928875436e-04
    p = p * squared + 4.89352455891786e-03
    q = 1.19825839466702e-06 * squared + 1.18534705686654e-04
    q = q * squared + 2.26843463243900e-03
    q = q * squared + 4.89352518554385e-03
    return softcap * (x * p / q)


@triton.jit
def rounded(numbers, dtype: tl.constexpr):
    """Round float32 numbers to the nearest of another dtype; alone, the interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = numbers.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        numbers = tl.where(numbers == numbers, nearest.to(tl.float32, bitcast=True), numbers)
    return numbers.to(dtype)


@triton.jit
def range_of(least, most, mask):
    """Return the largest less the least of the masked numbers along dim 1, float32; 0 of no numbers, NaN with a NaN."""
    low = tl.where(mask, least.to(tl.float32), float("inf"))
    high = tl.where(mask, most.to(tl.float32), -float("inf"))
    is_broken = tl.sum(((low != low) | (high != high)).to(tl.int32), 1) > 0  # tl.min and tl.max skip NaN
    span = tl.max(high, 1) - tl.min(low, 1)
    return tl.where(is_broken, float("nan"), tl.where(span < 0, 0.0, span))


@triton.jit
def load_query(query, head, start, G: tl.constexpr, D: tl.constexpr, G_PAD: tl.constexpr, WIDTH: tl.constexpr):
    """Load `WIDTH` channels, from `start` on, of the queries of a KV head, `[G_PAD, WIDTH]`; zero beyond G and D."""
    group, channel = tl.arange(0, G_PAD), start + tl.arange(0, WIDTH)
    mask = (group[:, None] < G) & (channel[None, :] < D)
    return tl.load(query + (head * G + group[:, None]) * D + channel[None, :], mask=mask, other=0.0)
