"""The page bounds of an index on the device; ops/pages.py specifies them and describes their layout."""

import triton
import triton.language as tl

from rocketkv import ops
from rocketkv.backends.triton.common import range_of

PAGES_PER_BLOCK = tl.constexpr(ops.PAGES_PER_BLOCK)


@triton.jit
def page_start(head, page, num_blocks, NUM_ROWS: tl.constexpr):
    """Return the place of a page's first bound, counted in bounds; its next bound is PAGES_PER_BLOCK further."""
    block = page // PAGES_PER_BLOCK
    return (head * num_blocks + block) * (NUM_ROWS * PAGES_PER_BLOCK) + page % PAGES_PER_BLOCK


@triton.jit
def page_range(bounds, head, block, length, size, num_blocks, channel, NUM_ROWS: tl.constexpr, D: tl.constexpr):
    """Return the range of a block's keys along these channels, which the block adds to the spread."""
    page = tl.arange(0, PAGES_PER_BLOCK)
    mask = (channel < D)[:, None] & ((page + block * PAGES_PER_BLOCK) * size < length)[None, :]
    at = bounds + ((head * num_blocks + block) * NUM_ROWS + channel[:, None]) * PAGES_PER_BLOCK + page[None, :]
    least = tl.load(at, mask=mask, other=0.0)
    most = tl.load(at + (NUM_ROWS - D) * PAGES_PER_BLOCK, mask=mask, other=0.0)
    return range_of(least, most, mask)


@triton.jit
def fold_key(bounds, key, first, NUM_ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Widen the bounds that begin at `first` to include a key, `[D_PAD]`; see `fold_into_pages`."""
    channel = tl.arange(0, D_PAD)
    for start in tl.static_range(0, NUM_ROWS, D):
        at = bounds + first + (start + channel) * PAGES_PER_BLOCK
        new, old = key.to(tl.float32), tl.load(at, mask=channel < D).to(tl.float32)
        is_beyond = new > old if start + D == NUM_ROWS else new < old
        tl.store(at, key, mask=(channel < D) & (is_beyond | (new != new)))
