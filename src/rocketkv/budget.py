"""One knob, the token budget, and what it is spent on. Pure integers, no torch; `paper.py` has the published split."""

from numbers import Integral
from typing import NamedTuple

from rocketkv.errors import ConfigError


class Split(NamedTuple):
    """What a decode step reads: `num_channels` of head_dim for each page of `page_size` tokens, then `top_k` tokens."""

    page_size: int
    num_channels: int
    top_k: int


class Budget(NamedTuple):
    """How one row spends its token budget.

    Attributes:
        kept_tokens: prompt tokens that stage 1 keeps, the observation window included.
        page_size: consecutive kept tokens that share one entry of the stage-2 index.
        num_channels: channels of head_dim read from each page's entry.
        top_k: tokens attended exactly in a decode step; a row that holds no more is attended densely.
    """

    kept_tokens: int
    page_size: int
    num_channels: int
    top_k: int


def check_count(name: str, value: object, least: int) -> int:
    """The whole number `value`, of whatever type, `least` or more.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not a whole number; give {least} or more.")
    if value < least:
        raise ConfigError(f"{name}={value} is too small; give {least} or more.")
    return int(value)


def prompt_share(kept: int, seq_len: int, new_tokens: int) -> int:
    """Prompt tokens among `kept` tokens, if `new_tokens` tokens that are still to come count as kept.

    As many prompt tokens as new ones are kept at least, or all `seq_len` of them.
    """
    return max(kept, min(2 * new_tokens, seq_len + new_tokens)) - new_tokens


def dense_split(token_budget: int, head_dim: int) -> Split:
    """The split of a row that fits in the budget: all of it is attended, nothing is scored."""
    return Split(1, head_dim, token_budget)
