"""The token budget and what it buys, in whole numbers without torch; `paper.py` has the published formulas."""

from numbers import Integral
from typing import NamedTuple

from rocketkv.errors import ConfigError


class Split(NamedTuple):
    """What a decode step reads: `num_channels` channels of each page of `page_size` tokens, then `top_k` tokens."""

    page_size: int
    num_channels: int
    top_k: int


class Budget(NamedTuple):
    """How one row spends its token budget.

    Attributes:
        kept_tokens: the number of prompt tokens that stage 1 keeps, the observation window included.
        page_size: the number of consecutive kept tokens that share one entry of the index.
        num_channels: the number of channels, 1 to head_dim, that a step reads of each page's entry.
        top_k: the number of tokens that a step attends to exactly; a row with no more kept tokens is attended densely.
    """

    kept_tokens: int
    page_size: int
    num_channels: int
    top_k: int


def check_count(name: str, value: object, least: int) -> int:
    """Return `value`, an integer of any type, as an int.

    Raises:
        ConfigError: `value` is no integer, or is below `least`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not a whole number; give {least} or more.")
    if value < least:
        raise ConfigError(f"{name}={value} is too small; give {least} or more.")
    return int(value)


def prompt_share(kept: int, seq_len: int, new_tokens: int) -> int:
    """Return how many of `kept` tokens are prompt tokens, if the `new_tokens` tokens to come count as kept.

    The result is at least `new_tokens`, or all `seq_len` prompt tokens if they are fewer.
    """
    return max(kept, min(2 * new_tokens, seq_len + new_tokens)) - new_tokens


def dense_split(token_budget: int, head_dim: int) -> Split:
    """Return the split of a row that fits in the budget: a step attends to all tokens and scores none."""
    return Split(1, head_dim, token_budget)
