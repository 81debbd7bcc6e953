"""The methods of the paper as points on our two axes, stage 1 x stage 2, and any other point by its options.

A method's name may be followed by options of `RocketKVConfig`: `rocketkv:sink_tokens=0:window_size=16`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError

FULL = "full"
METHODS: dict[str, dict[str, Any]] = {
    FULL: {"eviction": "keep_all", "selection": "dense"},
    "exact_topk": {"eviction": "keep_all", "selection": "exact", "recent_tokens": 0},
    "snapkv": {"eviction": "snapkv", "selection": "dense"},
    "streaming_llm": {"eviction": "streaming_llm", "selection": "dense"},
    "quest": {"eviction": "keep_all", "selection": "quest", "recent_tokens": 0},
    "sparq": {"eviction": "keep_all", "selection": "sparq", "recent_tokens": 0},
    "hybrid": {"eviction": "keep_all", "selection": "hybrid_paper", "recent_tokens": 0},
    "rocketkv": {},
    "rocketkv_mt": {"mode": "multi_turn"},
    "rocketkv_paper": {"eviction": "snapkv", "selection": "hybrid_paper", "recent_tokens": 0},
}


@dataclass(frozen=True)
class Arm:
    """A method at a token budget, which is None for the full cache.

    Raises:
        ConfigError: the budget does not fit the method.
        InputError: there is no such method.
    """

    method: str
    token_budget: int | None

    def __post_init__(self) -> None:
        """Refuse a method or a budget that could not be run."""
        self.config()

    def config(self) -> RocketKVConfig:
        """Make the configuration of the cache."""
        return method_config(self.method, self.token_budget or 1)


def method_config(method: str, token_budget: int, **options: Any) -> RocketKVConfig:
    """Return the configuration of a method that keeps to its budget, however short the text.

    Args:
        method: a name of `METHODS`, with options after it or not.
        token_budget: the budget in tokens, see `RocketKVConfig`.
        options: options of `RocketKVConfig`; they come before those of the method.

    Raises:
        ConfigError: an option does not fit.
        InputError: there is no such method, or what follows its name is no option.
    """
    name, *texts = method.split(":")
    if name not in METHODS:
        raise InputError(f"method {name!r} does not exist; choose from {', '.join(METHODS)}.")
    given = dict(_parse_option(method, text) for text in texts)
    return RocketKVConfig(**{"token_budget": token_budget, "dense_below": 0, **METHODS[name], **given, **options})


def _parse_option(method: str, text: str) -> tuple[str, int | str]:
    """Return the name and value of an option `name=value`, with numbers as numbers."""
    name, equals, value = text.partition("=")
    if not (name and equals and value) or name == "token_budget":
        raise InputError(f"method {method!r} has {text!r} where an option stands; write, say, rocketkv:window_size=16.")
    return name, int(value) if value.isdecimal() else value


def sort_methods(methods: Iterable[str]) -> list[str]:
    """Return each method once, in the order of `METHODS`; variants by options follow the method that they vary.

    Raises:
        InputError: there is no such method.
    """
    order = list(METHODS)

    def place(method: str) -> tuple[int, bool]:
        name, colon, _ = method.partition(":")
        if name not in METHODS:
            raise InputError(f"method {name!r} does not exist; choose from {', '.join(METHODS)}.")
        return order.index(name), bool(colon)

    return sorted(dict.fromkeys(methods), key=place)


def make_arms(methods: Sequence[str], budgets: Sequence[int]) -> list[Arm]:
    """Return every method at every budget, the full cache first and once; errors are those of `Arm`."""
    full = [Arm(FULL, None)] if FULL in methods else []
    return full + [Arm(name, budget) for budget in budgets for name in dict.fromkeys(methods) if name != FULL]
