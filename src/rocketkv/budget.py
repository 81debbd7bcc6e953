"""One knob, the token budget, and how it is split between the two stages. Pure integers, no torch."""

import math
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
        prompt_tokens: prompt tokens kept after stage 1, the observation window included.
        page_size: consecutive kept tokens that share one entry of the stage-2 index.
        num_channels: channels of head_dim read from each page's entry.
        top_k: tokens attended exactly in a decode step; a row that holds no more is attended densely.
    """

    prompt_tokens: int
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


def held_tokens(seq_len: int, token_budget: int) -> int:
    """Tokens to hold after stage 1, `seq_len / c**r` with the adaptive exponent r of the compression factor c.

    RocketKV, section "Adaptive Compression Decomposition".

    Args:
        seq_len: prompt tokens plus the new tokens expected, >= 1.
        token_budget: tokens' worth of KV traffic of one decode step, >= 1.

    Returns:
        A number of tokens, at most `seq_len`; all of them when `seq_len <= token_budget`.
    """
    factor = max(1.0, seq_len / token_budget)
    exponent = min(0.2 + 0.06 * math.log2(factor), 0.8)
    return math.floor(seq_len / math.pow(factor, exponent))


def kept_tokens(held: int, seq_len: int, new_tokens: int) -> int:
    """Prompt tokens that stage 1 keeps if `held` tokens are to be held in all, `new_tokens` included.

    As many prompt tokens as new ones are kept at least, or all `seq_len` of them.
    """
    return max(held, min(2 * new_tokens, seq_len + new_tokens)) - new_tokens


def dense_split(token_budget: int, head_dim: int) -> Split:
    """The split of a row that fits in the budget: all of it is attended, nothing is scored."""
    return Split(1, head_dim, token_budget)


def split_selection(num_tokens: int, token_budget: int, head_dim: int) -> Split:
    """Split stage 2 between page size and channels so that scoring costs half of the budget.

    RocketKV, section "Hybrid Sparse Attention".

    Args:
        num_tokens: tokens that stage 2 chooses from, >= 1.
        token_budget: tokens' worth of KV traffic of one decode step, >= 1.
        head_dim: channels of a key, >= 1.

    Returns:
        The page size, the channels read per page and the tokens attended exactly.
    """
    factor = max(1.0, num_tokens / token_budget)
    page_size = math.ceil(math.sqrt(factor))
    if page_size > factor:
        page_size = 1
    num_channels = max(1, math.floor(head_dim * page_size / factor))
    return Split(page_size, num_channels, max(1, token_budget // 2))


def split_budget(seq_len: int, token_budget: int, head_dim: int, *, new_tokens: int = 0) -> Budget:
    """Split the token budget between eviction and selection, as published; `rocketkv budget` shows ours.

    Args:
        seq_len: prompt tokens, >= 1.
        token_budget: tokens' worth of KV traffic that one decode step may cost per KV head, >= 1.
        head_dim: channels of a key, >= 1.
        new_tokens: tokens expected to be generated, >= 0; 0 when unknown.

    Returns:
        The split; dense (everything kept, everything attended) when prompt and new tokens fit in the budget.

    Raises:
        ConfigError: an argument is out of its range.
    """
    for name, value, least in (
        ("seq_len", seq_len, 1),
        ("token_budget", token_budget, 1),
        ("head_dim", head_dim, 1),
        ("new_tokens", new_tokens, 0),
    ):
        check_count(name, value, least)
    if seq_len + new_tokens <= token_budget:
        return Budget(seq_len, *dense_split(token_budget, head_dim))
    kept = kept_tokens(held_tokens(seq_len + new_tokens, token_budget), seq_len, new_tokens)
    return Budget(kept, *split_selection(kept + new_tokens, token_budget, head_dim))
