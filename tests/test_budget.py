import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rocketkv import Budget, ConfigError
from rocketkv.paper import split_budget
from rocketkv.selection import Hybrid, LowBit

lengths = st.integers(1, 1 << 20)
budgets = st.integers(1, 1 << 14)
head_dims = st.sampled_from([64, 80, 96, 128, 256])


def test_worked_example_of_the_paper_c_64() -> None:
    split = split_budget(64 * 1024, 1024, 128)
    assert split.kept_tokens == math.floor(65536 / 64**0.56)
    assert split.page_size == 3
    assert split.num_channels == 128 * 3 * 1024 // split.kept_tokens
    assert split.top_k == 512


def test_128k_at_512() -> None:
    assert split_budget(131072, 512, 128) == Budget(3019, 3, 65, 256)


@given(lengths, budgets, head_dims, st.integers(0, 4096))
def test_every_part_is_in_its_range(seq_len: int, budget: int, head_dim: int, new: int) -> None:
    split = split_budget(seq_len, budget, head_dim, new_tokens=new)
    assert all(isinstance(part, int) for part in split)
    assert 0 < split.kept_tokens <= seq_len
    assert split.page_size >= 1
    assert 1 <= split.num_channels <= head_dim
    assert 1 <= split.top_k <= budget


@given(lengths, budgets, head_dims)
def test_never_reads_more_than_the_budget(seq_len: int, budget: int, head_dim: int) -> None:
    split = split_budget(seq_len, budget, head_dim)
    if seq_len <= budget or budget == 1:
        return  # dense, where no index is read; and one token cannot be split in two
    pages = split.kept_tokens // split.page_size
    scored = pages * split.num_channels / (2 * head_dim)  # in tokens of keys and values
    assert scored + split.top_k <= budget


@given(lengths, budgets, head_dims, st.integers(0, 4096))
def test_dense_when_everything_fits(seq_len: int, budget: int, head_dim: int, new: int) -> None:
    if seq_len + new <= budget:
        assert split_budget(seq_len, budget, head_dim, new_tokens=new) == Budget(seq_len, 1, head_dim, budget)


@given(lengths, budgets, budgets, head_dims)
def test_a_larger_budget_keeps_and_attends_no_less(seq_len: int, one: int, other: int, head_dim: int) -> None:
    small, large = sorted([one, other])
    a, b = split_budget(seq_len, small, head_dim), split_budget(seq_len, large, head_dim)
    assert a.kept_tokens <= b.kept_tokens
    assert a.top_k <= b.top_k


@given(lengths, budgets, head_dims)
def test_more_is_held_of_a_longer_prompt_while_the_paper_says_so(seq_len: int, budget: int, head_dim: int) -> None:
    # The paper's exponent grows with the compression factor, so fewer tokens are kept again past c = 2**(0.8 / 0.12).
    if seq_len + 1 <= 100 * budget:
        shorter, longer = (split_budget(n, budget, head_dim) for n in (seq_len, seq_len + 1))
        assert shorter.kept_tokens <= longer.kept_tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 256, 64), "seq_len=0 is too small; give 1 or more."),
        ((10, 0, 64), "token_budget=0 is too small; give 1 or more."),
        ((10, 10, 0), "head_dim=0 is too small; give 1 or more."),
    ],
)
def test_refuses_what_makes_no_sense(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        split_budget(*arguments)
    assert str(error.value) == message


def test_stage_1_leaves_more_to_low_bit_keys_than_to_page_bounds() -> None:
    ours, published = LowBit(), Hybrid()
    assert (published.kept_tokens(2048, 128), ours.kept_tokens(2048, 128)) == (604, 1024)
    assert ours.kept_tokens(200, 128) == 200
    assert ours.kept_tokens(100, 128) == 100
