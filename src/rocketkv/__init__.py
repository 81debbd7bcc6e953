"""RocketKV: long-context decoding at a fraction of the KV cache (arXiv:2502.14051), for any Hugging Face decoder."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rocketkv.attention import LayerCache
    from rocketkv.budget import Budget
    from rocketkv.config import RocketKVConfig
    from rocketkv.errors import (
        CacheFileError,
        ConfigError,
        InputError,
        OutOfMemoryError,
        RocketKVError,
        UnknownOptionError,
        UnsupportedError,
    )
    from rocketkv.hf import PrefixStore, RocketKVCache, compile, disable, enable, uncompile
    from rocketkv.ops import LogitTerms

__version__ = "0.1.0"

_HOMES = {  # names are imported on first use, so that `import rocketkv` and the command line's help stay quick
    "Budget": "budget",
    "CacheFileError": "errors",
    "ConfigError": "errors",
    "InputError": "errors",
    "LayerCache": "attention",
    "LogitTerms": "ops",
    "OutOfMemoryError": "errors",
    "PrefixStore": "hf",
    "RocketKVCache": "hf",
    "RocketKVConfig": "config",
    "RocketKVError": "errors",
    "UnknownOptionError": "errors",
    "UnsupportedError": "errors",
    "compile": "hf",
    "disable": "hf",
    "enable": "hf",
    "uncompile": "hf",
}

__all__ = [
    "Budget",
    "CacheFileError",
    "ConfigError",
    "InputError",
    "LayerCache",
    "LogitTerms",
    "OutOfMemoryError",
    "PrefixStore",
    "RocketKVCache",
    "RocketKVConfig",
    "RocketKVError",
    "UnknownOptionError",
    "UnsupportedError",
    "compile",
    "disable",
    "enable",
    "uncompile",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'rocketkv' has no attribute {name!r}")
    return getattr(import_module(f"rocketkv.{_HOMES[name]}"), name)
