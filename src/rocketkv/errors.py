"""The errors a user can meet. Each message says what was wrong, the value, what is allowed and the way out."""


class RocketKVError(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one sentence."""


class ConfigError(RocketKVError, ValueError):
    """An option is out of range or contradicts another one."""


class UnknownOptionError(ConfigError, TypeError):
    """An option that does not exist was passed by name."""


class InputError(RocketKVError, ValueError):
    """A tensor, a file or a text that cannot be used as given."""


class CacheFileError(InputError):
    """A file of a saved cache that cannot be written or used: missing, damaged, of another model or version."""


class UnsupportedError(RocketKVError, NotImplementedError):
    """A model, a mask or a way of generating that does not fit; refused rather than answered wrongly."""
