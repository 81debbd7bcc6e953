"""Tests of what a cache keeps and reads: what its budget allows, and what the cache reports."""

import pytest
import torch

from caches import SMALL, strict
from inputs import Inputs, make_inputs
from rocketkv import Budget, LayerCache, RocketKVConfig
from rocketkv.paper import split_budget


@pytest.mark.usefixtures("decoded_by")
def test_the_budget_holds_however_long_the_answer_gets(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 700, 64)
    cache = LayerCache(strict(token_budget=64, window_size=16))
    token_bytes = 2 * 64 * 2 * 4  # keys and values of two KV heads
    cache.prefill(*x.part(0, 30))
    for t in range(30, 700):
        cache.decode(*x.part(t, t + 1))
        assert cache.read_bytes <= 1.2 * 64 * token_bytes, t
    assert int(cache.num_stored[0, 0]) == 700


@pytest.mark.usefixtures("decoded_by")
def test_what_is_kept_and_read_is_what_split_budget_says(seeded: torch.Generator) -> None:
    for length, budget, new in [(400, 48, 0), (400, 48, 30), (130, 120, 0), (90, 100, 20), (60, 40, 200)]:
        x = make_inputs(seeded, 1, 4, 2, length, 64)
        cache = LayerCache(RocketKVConfig.paper(budget, new_tokens=new))
        cache.prefill(*x)
        split = split_budget(length, budget, 64, new_tokens=new)
        assert cache.plan is not None
        assert (int(cache.num_stored[0, 0]), *cache.plan.splits[0]) == split


@pytest.mark.usefixtures("decoded_by")
def test_read_bytes_count_what_the_method_reads(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 2, 4, 2, 512, 64)
    expected = {
        "dense": 2 * 64 * 64,
        "exact": 512 * 64 + 2 * 64 * 64,
        "quest": 32 * 2 * 64 + 2 * 32 * 64,
        "sparq": 512 * 8 + 2 * 32 * 64,
        "hybrid": 64 + -(-512 // 3) * 24 + 2 * 31 * 64,
        "hybrid_paper": -(-512 // 3) * 24 + 2 * 32 * 64,
    }
    for selection, elements in expected.items():
        eviction = "snapkv" if selection == "dense" else "keep_all"
        cache = LayerCache(strict(token_budget=64, eviction=eviction, selection=selection, new_tokens=1))
        cache.prefill(*x.part(0, 511))
        cache.decode(*x.part(511, 512))
        assert cache.read_bytes == 2 * 2 * 4 * elements, selection  # two rows, two KV heads, four bytes
        if selection != "exact":  # within the budget, but for the last page, which may be partly empty
            assert cache.read_bytes <= 2 * 2 * 4 * (2 * 64 * 64 + 24), selection


@pytest.mark.usefixtures("decoded_by")
def test_sparq_reads_every_token_whatever_page_size_is_given(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 301, 16)
    budget = Budget(300, 4, 4, 10)
    config = strict(token_budget=100, eviction="keep_all", selection="sparq", budget=budget)
    cache = LayerCache(config)
    cache.prefill(*x.part(0, 300))
    cache.decode(*x.part(300, 301))
    assert cache.read_bytes == 2 * 4 * (301 * 4 + 10 * 2 * 16)


def test_room_for_very_many_tokens_is_made_in_steps(x: Inputs) -> None:
    cache = LayerCache(RocketKVConfig(**SMALL, new_tokens=10**6))
    cache.prefill(*x.part(0, 200))
    token_bytes = 2 * 2 * (2 * 16 * 4 + 4)
    assert cache.kv_bytes < 3 * 1500 * token_bytes
    for t in range(200, 260):
        cache.decode(*x.part(t, t + 1))
    assert cache.row_seen == [260, 260]


@pytest.mark.parametrize(
    ("selection", "kv_dtype", "most"),
    [
        ("lowbit", "auto", 7 * (64 // 4 - 1) * 16),
        ("lowbit", "int8", 7 * (64 // 3 - 1) * 16),
        ("sparq", "auto", 64 * 16),
    ],
)
def test_a_budget_that_a_long_row_exceeds_is_told(selection: str, kv_dtype: str, most: int) -> None:
    config = RocketKVConfig(token_budget=64, window_size=8, selection=selection, kv_dtype=kv_dtype, dense_below=0)

    def loaded(num_tokens: int) -> LayerCache:
        cache = LayerCache(config)
        cache.load_tokens(*torch.randn(2, 1, 1, num_tokens, 16).bfloat16(), num_seen=num_tokens)
        return cache

    def decode(cache: LayerCache, count: int) -> None:
        for _ in range(count):
            cache.decode(*torch.randn(3, 1, 1, 1, 16).bfloat16())

    cache = loaded(int(0.9 * most))
    with pytest.warns(UserWarning, match=r"reads more than token_budget=.* in each step; raise token_budget"):
        decode(cache, most)
    with pytest.warns(UserWarning, match="reads more than token_budget=64 in each step"):
        cache = loaded(2 * most)
    decode(cache, 1)
    assert cache.read_bytes > 64 * 2 * 16 * 2
