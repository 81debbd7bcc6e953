"""Tests of how a row spends its budget, seen through what a `LayerCache` keeps and reads."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rocketkv import LayerCache, RocketKVConfig

pytestmark = pytest.mark.filterwarnings("ignore:a row has grown so long")  # the smallest budgets cause the warning
few = settings(deadline=None, max_examples=25, derandomize=True)
lengths, budgets = st.integers(1, 400), st.integers(8, 120)
methods = st.sampled_from(["lowbit", "hybrid", "dense"])


def prefilled(lengths: list[int], num_new: int = 0, **options: Any) -> LayerCache:
    """Return a cache of rows of these lengths, with one KV head, that has decoded `num_new` tokens."""
    options = {"window_size": 4, "kernel_size": 3, "dense_below": 0, **options}
    cache = LayerCache(RocketKVConfig(**options))
    width = max(lengths)
    cache.prefill(*torch.randn(3, len(lengths), 1, width, 16), padding=torch.tensor([width - n for n in lengths]))
    for _ in range(num_new):
        cache.decode(*torch.randn(3, len(lengths), 1, 1, 16))
    return cache


def kept(cache: LayerCache) -> list[int]:
    return [int(num) for num in cache.num_stored[:, 0]]


@few
@given(lengths, budgets, methods)
def test_a_row_that_fits_in_the_budget_keeps_everything_and_another_does_not_exceed_its_own_length(
    seq_len: int, budget: int, selection: str
) -> None:
    (num,) = kept(prefilled([seq_len], token_budget=budget, selection=selection))
    assert num == seq_len if seq_len <= budget else 1 <= num <= seq_len


@few
@given(lengths, budgets, budgets, methods)
def test_a_larger_budget_keeps_no_less(seq_len: int, one: int, other: int, selection: str) -> None:
    small, large = (kept(prefilled([seq_len], token_budget=b, selection=selection))[0] for b in sorted([one, other]))
    assert small <= large


@few
@given(st.lists(lengths, min_size=2, max_size=3), budgets, methods)
def test_each_row_is_planned_as_if_it_were_alone(seq_lens: list[int], budget: int, selection: str) -> None:
    options = {"token_budget": budget, "selection": selection}
    together = prefilled(seq_lens, num_new=2, **options)
    alone = [prefilled([seq_len], num_new=2, **options) for seq_len in seq_lens]
    assert kept(together) == [kept(cache)[0] for cache in alone]
    assert together.read_bytes == sum(cache.read_bytes for cache in alone)


@few
@given(lengths, st.integers(32, 120), st.sampled_from([10, 100, 300]))
def test_a_growing_answer_reads_no_more_than_an_eighth_above_the_budget(
    seq_len: int, budget: int, num_new: int
) -> None:
    cache = prefilled([seq_len], num_new, token_budget=budget, selection="hybrid")
    assert cache.read_bytes <= 1.125 * budget * 2 * 16 * 4


@few
@given(lengths, budgets, st.integers(0, 40))
def test_tokens_that_are_expected_are_accounted_for(seq_len: int, budget: int, new_tokens: int) -> None:
    (without,) = kept(prefilled([seq_len], token_budget=budget))
    (with_them,) = kept(prefilled([seq_len], token_budget=budget, new_tokens=new_tokens))
    if seq_len + new_tokens <= budget:
        assert with_them == without == seq_len
    if new_tokens == 0:
        assert with_them == without


@few
@given(st.lists(lengths, min_size=2, max_size=3), budgets, st.integers(1, 60))
def test_going_back_over_an_answer_plans_as_if_it_had_never_been(seq_lens: list[int], budget: int, new: int) -> None:
    torch.manual_seed(0)
    cache = prefilled(seq_lens, token_budget=budget)
    before = cache.copy()
    tokens = torch.randn(new, 3, len(seq_lens), 1, 1, 16)
    for x in tokens:
        cache.decode(*x)
    cache.rewind(before.num_seen, before.row_seen)
    assert torch.equal(cache.decode(*tokens[0]), before.decode(*tokens[0]))
    assert cache.read_bytes == before.read_bytes
