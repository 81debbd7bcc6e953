"""The methods of the paper as points on our two axes, stage 1 x stage 2."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError

FULL = "full"
METHODS: dict[str, dict[str, Any]] = {
    FULL: {"eviction": "keep_all", "selection": "dense"},
    "exact_topk": {"eviction": "keep_all", "selection": "exact"},
    "snapkv": {"eviction": "snapkv", "selection": "dense"},
    "streaming_llm": {"eviction": "streaming_llm", "selection": "dense"},
    "quest": {"eviction": "keep_all", "selection": "quest"},
    "sparq": {"eviction": "keep_all", "selection": "sparq"},
    "hybrid": {"eviction": "keep_all", "selection": "hybrid"},
    "rocketkv": {"eviction": "snapkv", "selection": "hybrid"},
    "rocketkv_mt": {"eviction": "snapkv", "selection": "hybrid", "mode": "multi_turn"},
    "rocketkv_paper": {"eviction": "snapkv", "selection": "hybrid", "sink_tokens": 0, "recent_tokens": 0},
}


@dataclass(frozen=True)
class Arm:
    """What is compared: a method at a token budget, None for the full cache.

    Raises:
        ConfigError: the budget does not fit the method.
        InputError: there is no such method.
    """

    method: str
    token_budget: int | None

    def __post_init__(self) -> None:
        """Refuse early what could not be run."""
        self.config()

    def config(self) -> RocketKVConfig:
        """How its cache compresses."""
        return method_config(self.method, self.token_budget or 1)


def method_config(name: str, token_budget: int, **options: Any) -> RocketKVConfig:
    """The configuration of a method that keeps to its budget, however short the text; `options` of `RocketKVConfig`.

    Raises:
        ConfigError: an option does not fit.
        InputError: there is no such method.
    """
    if name not in METHODS:
        raise InputError(f"method {name!r} does not exist; choose from {', '.join(METHODS)}.")
    return RocketKVConfig(**{"token_budget": token_budget, "dense_below": 0, **METHODS[name], **options})


def make_arms(methods: Sequence[str], budgets: Sequence[int]) -> list[Arm]:
    """Every method at every budget; the full cache first and once. Errors as of `Arm`."""
    full = [Arm(FULL, None)] if FULL in methods else []
    return full + [Arm(name, budget) for budget in budgets for name in dict.fromkeys(methods) if name != FULL]
