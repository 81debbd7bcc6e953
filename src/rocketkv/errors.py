"""The errors that a user can meet. Each message says what is wrong, the value, what is allowed and the way out."""


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


class UnsupportedError(RocketKVError, NotImplementedError):
    """A model, a mask or a way of generating does not fit; the package refuses it rather than answer wrongly."""
