"""The paper's split of a token budget between the two stages (arXiv:2502.14051), in whole numbers without torch."""

import math

from rocketkv.budget import Budget, Split, check_count, dense_split, prompt_share


def kept_tokens(seq_len: int, token_budget: int) -> int:
    """Return how many tokens stage 1 keeps: `seq_len / c**r`, where r is the adaptive exponent of the compression c.

    Source: RocketKV, section "Adaptive Compression Decomposition".

    Args:
        seq_len: the number of prompt tokens plus the number of new tokens expected, >= 1.
        token_budget: the KV traffic of one decode step, in tokens, >= 1.

    Returns:
        A number of tokens, at most `seq_len`; it is `seq_len` when `seq_len <= token_budget`.
    """
    factor = max(1.0, seq_len / token_budget)
    exponent = min(0.2 + 0.06 * math.log2(factor), 0.8)
    return math.floor(seq_len / math.pow(factor, exponent))


def split_selection(num_tokens: int, token_budget: int, head_dim: int) -> Split:
    """Choose a page size and a number of channels with which scoring costs half of the budget.

    Source: RocketKV, section "Hybrid Sparse Attention".

    Args:
        num_tokens: the number of tokens that stage 2 chooses from, >= 1.
        token_budget: the KV traffic of one decode step, in tokens, >= 1.
        head_dim: the number of channels of a key, >= 1.

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
    """Split the token budget between eviction and selection, as published.

    `RocketKVConfig.budget_for` returns the budget of any configuration, the default included.

    Source: RocketKV, sections "Adaptive Compression Decomposition" and "Hybrid Sparse Attention".

    Args:
        seq_len: the number of prompt tokens, >= 1.
        token_budget: the KV traffic that one decode step may cost per KV head, in tokens, >= 1.
        head_dim: the number of channels of a key, >= 1.
        new_tokens: the number of tokens expected to be generated, >= 0; give 0 if it is not known.

    Returns:
        The budget. When prompt and new tokens fit in `token_budget`, all tokens are kept and attended to.

    Raises:
        ConfigError: an argument is not a whole number, or is out of its range.
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
    kept = prompt_share(kept_tokens(seq_len + new_tokens, token_budget), seq_len, new_tokens)
    return Budget(kept, *split_selection(kept + new_tokens, token_budget, head_dim))
