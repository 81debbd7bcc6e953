"""Names the kernels that `make sanitize` builds and tests: those of the first and of the last instruction set here.

The others are compiled from the same source, and each of its branches is in one of these two.
"""

from rocketkv.backends import library


def sanitized() -> list[str]:
    """Return the modules of these kernels, the fastest first."""
    names = library.library_names()
    return list(dict.fromkeys([names[0], names[-1]]))


if __name__ == "__main__":
    print(*(name.rpartition(".")[2] for name in sanitized()))
