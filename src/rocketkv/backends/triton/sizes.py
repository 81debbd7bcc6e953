"""The sizes of the work of one program of the Triton kernels. This file needs no Triton."""

TILE_BYTES = 1 << 14  # the most bytes that a program loads at a time, so that they fit in registers
PART = 64  # the most units that a program scores at a time
LEAST_PARTS = 4  # the fewest parts that a program scores, one after the other
SCORING_PROGRAMS_PER_CORE = 16  # the number of scoring programs per core to aim at where there are many heads
TILE = 32  # the most tokens that a program attends to at a time
BLOCK = 1024  # units that a program reads at a time while it chooses
DIGIT = 8  # bits of the cut that one walk over the scores finds
LEAST_DOT = 16  # the least rows and columns of a matrix product in Triton; smaller ones are padded
LEAST_WINDOW_PART = 1024  # tokens that a program scores for stage 1, rounded down to whole tiles
PROGRAMS_PER_CORE = 2  # the number of attention programs per core to aim at where there are few heads
CORES_OF_CPU = 4  # cores assumed for the interpreter, so that tests have several pieces, but few


def power_of_two(number: int) -> int:
    """Return the least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def padded(number: int) -> int:
    """Return the rows or columns of a matrix product that has to have `number` of them, padding included."""
    return max(LEAST_DOT, power_of_two(number))
