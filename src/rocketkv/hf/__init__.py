"""The transformers wing: the cache as `generate` and a model's layers see it, and what hangs into a model.

This package is the only place of the library that knows transformers' internals. In an enabled model (`switch.py`) a
forward pass goes this way: `hooks.py` announces it to the cache -> `cache.py` has `passes.py` check it and make a
`Pass` -> `interface.py`, the attention function, gets the `Pass` -> `layer.py` -> `LayerCache`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rocketkv.hf.batch import batch_caches, row_stats
    from rocketkv.hf.cache import RocketKVCache
    from rocketkv.hf.compiled import compile, uncompile
    from rocketkv.hf.layer import RocketKVLayer
    from rocketkv.hf.layout import head_dims
    from rocketkv.hf.models import LoadedModel, load, load_meta
    from rocketkv.hf.plain import cache_stats
    from rocketkv.hf.session import Answer, Session
    from rocketkv.hf.store import PrefixStore
    from rocketkv.hf.switch import disable, enable
    from rocketkv.hf.versions import dependency, pass_cache
    from rocketkv.hf.weights import quantize

_HOMES = {  # resolved on first use: `versions` and `embedded` are wanted where transformers is not loaded
    "Answer": "session",
    "LoadedModel": "models",
    "PrefixStore": "store",
    "RocketKVCache": "cache",
    "RocketKVLayer": "layer",
    "Session": "session",
    "batch_caches": "batch",
    "cache_stats": "plain",
    "compile": "compiled",
    "dependency": "versions",
    "disable": "switch",
    "enable": "switch",
    "head_dims": "layout",
    "load": "models",
    "load_meta": "models",
    "pass_cache": "versions",
    "quantize": "weights",
    "row_stats": "batch",
    "uncompile": "compiled",
}

__all__ = [
    "Answer",
    "LoadedModel",
    "PrefixStore",
    "RocketKVCache",
    "RocketKVLayer",
    "Session",
    "batch_caches",
    "cache_stats",
    "compile",
    "dependency",
    "disable",
    "enable",
    "head_dims",
    "load",
    "load_meta",
    "pass_cache",
    "quantize",
    "row_stats",
    "uncompile",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'rocketkv.hf' has no attribute {name!r}")
    return getattr(import_module(f"rocketkv.hf.{_HOMES[name]}"), name)
