"""How much a program of the Triton kernels works on. This file needs no Triton."""

TILE_BYTES = 1 << 14  # of what a program reads at once, so that registers hold it
PART = 64  # units scored by a program, at most
TILE = 32  # tokens attended to at once, at most
BLOCK = 512  # units looked at together while choosing
WAYS_BITS = 4  # bits of the cut found in one pass over the scores
LEAST_DOT = 16  # rows of a matrix product: fewer query heads are filled up
LEAST_WINDOW_PART = 1024  # tokens that a program scores for stage 1, about
PROGRAMS_PER_CORE = 2  # of attention, aimed at where there are fewer heads than that
CORES_OF_CPU = 4  # of the interpreter, which runs one program after the other: few pieces, but several


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def padded(number: int) -> int:
    """Return how many rows or columns a matrix product has that needs so many."""
    return max(LEAST_DOT, power_of_two(number))
