"""The errors that a user can meet. Each message says what is wrong, the value, what is allowed and the way out."""

from collections.abc import Iterator
from contextlib import contextmanager

_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")  # torch on a GPU, on Linux and on Windows


class RocketKVError(Exception):
    """The base of every error that this package raises on purpose; the command line prints its message alone."""


class ConfigError(RocketKVError, ValueError):
    """An option is out of range or contradicts another one."""


class UnknownOptionError(ConfigError, TypeError):
    """An option does not exist, has no name, or is missing."""


class InputError(RocketKVError, ValueError):
    """A tensor, a file or a text cannot be used as given."""


class CacheFileError(InputError):
    """A file of a saved cache that cannot be written or used: missing, damaged, of another model or version."""


class OutOfMemoryError(RocketKVError, MemoryError):
    """The system has no memory left for what was asked; nothing is wrong with what was given."""


class UnsupportedError(RocketKVError, NotImplementedError):
    """A model, a mask or a way of generating does not fit; the package refuses it rather than answer wrongly."""


@contextmanager
def telling_memory(task: str) -> Iterator[None]:
    """Raise an `OutOfMemoryError` that names the task, such as "to load a cache", where there is no memory for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = str(error)
        if not isinstance(error, MemoryError) and not any(words in reason.lower() for words in _NO_MEMORY):
            raise
        raise OutOfMemoryError(
            f"there is not enough memory {task} ({reason or 'MemoryError'}); free some, and try again."
        ) from None
