"""The methods of the paper as points on our two axes, stage 1 x stage 2."""

from typing import Any

from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError

METHODS: dict[str, dict[str, Any]] = {
    "full": {"eviction": "keep_all", "selection": "dense"},
    "exact_topk": {"eviction": "keep_all", "selection": "exact"},
    "snapkv": {"eviction": "snapkv", "selection": "dense"},
    "streaming_llm": {"eviction": "streaming_llm", "selection": "dense"},
    "quest": {"eviction": "keep_all", "selection": "quest"},
    "sparq": {"eviction": "keep_all", "selection": "sparq"},
    "hybrid": {"eviction": "keep_all", "selection": "hybrid"},
    "rocketkv": {"eviction": "snapkv", "selection": "hybrid"},
}


def method_config(name: str, token_budget: int, **options: Any) -> RocketKVConfig:
    """The configuration of a method that keeps to its budget, however short the text; `options` of `RocketKVConfig`.

    Raises:
        InputError: there is no such method.
    """
    if name not in METHODS:
        raise InputError(f"method {name!r} does not exist; choose from {', '.join(METHODS)}.")
    return RocketKVConfig(token_budget=token_budget, dense_below=0, **METHODS[name], **options)
