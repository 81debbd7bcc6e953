"""Tests of `LayerCache` against plain loops, against dense attention, and over any conversation."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import oracle
from caches import ALL_METHODS, decode_all, strict
from inputs import make_inputs
from rocketkv import Budget, LayerCache, RocketKVConfig
from rocketkv.selection import SELECTION_METHODS

pytestmark = pytest.mark.usefixtures("decoded_by")


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 64), (3, 3, 80), (8, 1, 96)])
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize(("eviction", "selection"), [("snapkv", "hybrid"), ("peak", "lowbit")])
def test_rocketkv_is_the_method_in_plain_loops(
    seeded: torch.Generator,
    mode: str,
    eviction: str,
    selection: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    x = make_inputs(seeded, 1, num_heads, num_kv_heads, 420, head_dim)
    sizes = {"window_size": 16, "kernel_size": 5, "sink_tokens": 3, "recent_tokens": 5, "new_tokens": 20}
    cache = LayerCache(strict(token_budget=40, mode=mode, eviction=eviction, selection=selection, **sizes))
    prompt = x.part(0, 400)
    output = cache.prefill(*prompt)
    q, k, v = (a[0].double().numpy() for a in x)
    np.testing.assert_allclose(output[0], oracle.dense(q[:, :400], k[:, :400], v[:, :400]), atol=1e-5)

    kept_count = int(cache.num_stored[0, 0])
    # 420 tokens at 40: c = 10.5, r = 0.404, 162 kept by the paper's formula and 8 x 40 for low-bit keys, 20 of them new
    assert kept_count == {"hybrid": 142, "lowbit": 300}[selection]
    reach = {"snapkv": (2, 2), "peak": (1, 3)}[eviction]
    scores = oracle.pooled(oracle.window_scores(q[:, :400], k[:, :400], 16, by_peak=eviction == "peak"), 16, *reach)
    group = num_heads // num_kv_heads
    for head in range(num_kv_heads):
        kept = cache.positions[0, head].tolist()
        assert kept == sorted(kept)
        assert kept[-16:] == list(range(384, 400))
        best = np.sort(scores[head])[::-1][: kept_count - 16]
        np.testing.assert_allclose(np.sort(scores[head][kept[:-16]])[::-1], best, rtol=1e-4)

    plan = cache.plan
    for t in range(400, 420):
        output = cache.decode(*x.part(t, t + 1))
        for head in range(num_kv_heads):
            held = cache.positions[0, head].tolist()
            assert held[kept_count:] == list(range(400, t + 1))
            heads = slice(group * head, group * head + group)
            if selection == "hybrid":
                page_size = int(plan.page_size[0])
                spread = oracle.spread(k[head, held[:-1]], 32 * page_size)
                approximate = oracle.hybrid_token_scores(
                    q[heads, t], k[head, held], page_size, int(plan.num_channels[0]), spread
                )
            else:
                approximate = oracle.lowbit_token_scores(q[heads, t], k[head, held], int(plan.num_channels[0]))
            chosen = oracle.choose(approximate, int(plan.top_k[0]), 3, 5)
            expected = oracle.attend(q[heads, t], k[head, held], v[head, held], chosen)
            np.testing.assert_allclose(output[0, heads, 0], expected, atol=2e-5)


@pytest.mark.parametrize("selection", ["exact", "quest", "sparq", "hybrid", "hybrid_paper", "lowbit"])
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_every_selection_method_is_its_plain_loop(seeded: torch.Generator, mode: str, selection: str) -> None:
    x = make_inputs(seeded, 1, 6, 2, 230, 64)
    config = RocketKVConfig.paper(40, mode=mode, eviction="streaming_llm", selection=selection)
    cache = LayerCache(config)
    cache.prefill(*x.part(0, 210))
    q, k, v = (a[0].double().numpy() for a in x)
    assert cache.plan is not None
    split = cache.plan.splits[0]
    for t in range(210, 230):
        output = cache.decode(*x.part(t, t + 1))
        held = cache.positions[0, 0].tolist()
        for head in range(2):
            queries, keys, values = q[3 * head : 3 * head + 3, t], k[head, held], v[head, held]
            if selection == "quest":
                scores = oracle.quest_token_scores(queries, keys, split.page_size)
            elif selection == "lowbit":
                scores = oracle.lowbit_token_scores(queries, keys, split.num_channels)
            else:
                page_size = split.page_size if selection.startswith("hybrid") else 1
                num_channels = 64 if selection == "exact" else split.num_channels
                spread = oracle.spread(keys[:-1], 32 * page_size) if selection == "hybrid" else 1.0
                scores = oracle.hybrid_token_scores(queries, keys, page_size, num_channels, spread)
            expected = oracle.attend(queries, keys, values, oracle.choose(scores, split.top_k))
            np.testing.assert_allclose(output[0, 3 * head : 3 * head + 3, 0], expected, atol=2e-5)


@pytest.mark.parametrize(("num_tokens", "kept"), [(20, [0, 1, 2, 3, *range(84, 100)]), (3, [0, 1, 99])])
def test_streaming_llm_keeps_sinks_and_the_most_recent(
    seeded: torch.Generator, num_tokens: int, kept: list[int]
) -> None:
    x = make_inputs(seeded, 1, 4, 2, 100, 64)
    budget = Budget(num_tokens, 1, 64, 50)
    cache = LayerCache(strict(token_budget=50, eviction="streaming_llm", selection="dense", budget=budget))
    cache.prefill(*x)
    assert cache.positions.tolist() == [[kept, kept]]


@pytest.mark.parametrize(("eviction", "selection"), ALL_METHODS)
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_budget_for_everything_is_the_dense_path_to_the_bit(
    decoded_by: str, seeded: torch.Generator, mode: str, eviction: str, selection: str
) -> None:
    x = make_inputs(seeded, 2, 6, 2, 90, 64)
    cache = LayerCache(strict(token_budget=90, mode=mode, eviction=eviction, selection=selection))
    dense = LayerCache(strict(token_budget=90, mode=mode, eviction="keep_all", selection="dense"))
    output = cache.prefill(*x.part(0, 80))
    assert torch.equal(output, dense.prefill(*x.part(0, 80)))
    prompt = scaled_dot_product_attention(*x.part(0, 80), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output, prompt, rtol=1e-5, atol=1e-5)
    for t in range(80, 90):
        key, value = x.key[:, :, : t + 1], x.value[:, :, : t + 1]
        expected = scaled_dot_product_attention(x.query[:, :, t].reshape(2, 2, 3, 64), key, value)
        output = cache.decode(*x.part(t, t + 1))
        assert torch.equal(output, dense.decode(*x.part(t, t + 1)))
        if decoded_by == "reference":
            assert torch.equal(output, expected.reshape(2, 6, 1, 64))
        torch.testing.assert_close(output, expected.reshape(2, 6, 1, 64), rtol=1e-5, atol=1e-5)
    assert cache.working is not None
    assert cache.working.index is None  # there is nothing to select, so no index is built


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_what_is_held_is_attended_in_full_up_to_twice_the_budget(seeded: torch.Generator, mode: str) -> None:
    x = make_inputs(seeded, 2, 6, 2, 200, 64)
    padding = torch.tensor([0, 100])  # once the first row has grown, only the second is short
    options: dict[str, Any] = {"token_budget": 80, "mode": mode, "window_size": 16, "kernel_size": 7}
    by_default, in_full, selecting = (
        LayerCache(RocketKVConfig(**options, **more)) for more in ({}, {"dense_below": 10**6}, {"dense_below": 0})
    )
    for cache in (by_default, in_full, selecting):
        cache.prefill(*x.part(0, 150), padding=padding)
    assert by_default.working is not None
    assert 100 < by_default.working.max_length < 160
    for t in range(150, 200):
        output, full, _ = (cache.decode(*x.part(t, t + 1)) for cache in (by_default, in_full, selecting))
        if by_default.working.max_length <= 160:
            assert torch.equal(output, full)
            assert by_default.working.index is None
    assert by_default.working.max_length > 160
    torch.testing.assert_close(output[1], full[1])
    assert not torch.allclose(output[0], full[0], rtol=1e-3, atol=1e-3)
    assert selecting.read_bytes < by_default.read_bytes < in_full.read_bytes


@pytest.mark.parametrize("selection", [name for name in SELECTION_METHODS if name != "dense"])
def test_selecting_all_tokens_is_dense(seeded: torch.Generator, selection: str) -> None:
    x = make_inputs(seeded, 2, 6, 2, 300, 64)
    # the first row is long, so that a selection is made; the second has fewer than top_k tokens
    config = strict(token_budget=150, eviction="keep_all", selection=selection, budget=Budget(290, 2, 64, 100))
    selecting = LayerCache(config)
    dense = LayerCache(strict(token_budget=150, eviction="keep_all", selection="dense"))
    for cache in (selecting, dense):
        cache.prefill(*x.part(0, 290), padding=torch.tensor([0, 200]))
    output, expected = decode_all(selecting, x, 290, 300), decode_all(dense, x, 290, 300)
    torch.testing.assert_close(output[1], expected[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output[0], expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:a row has grown so long")  # true of the smallest budgets; test_budgets.py holds it
# `decoded_by` stays the same over all examples
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 1 << 30),
    st.sampled_from(ALL_METHODS),
    st.sampled_from(["single_turn", "multi_turn"]),
    st.lists(st.tuples(st.integers(1, 120), st.integers(0, 12)), min_size=1, max_size=4),
    st.integers(8, 80),
    st.sampled_from(["auto", "int8"]),
)
def test_any_conversation_stays_finite_and_consistent(
    seed: int, method: tuple[str, str], mode: str, turns: list[tuple[int, int]], budget: int, kv_dtype: str
) -> None:
    assume(kv_dtype == "auto" or method[1] != "exact")
    generator = torch.Generator().manual_seed(seed)
    options = {"mode": mode, "eviction": method[0], "selection": method[1], "kv_dtype": kv_dtype}
    cache = LayerCache(strict(token_budget=budget, window_size=8, kernel_size=3, **options))
    seen = 0
    for prompt, new in turns:
        x = make_inputs(generator, 2, 4, 2, prompt + new, 16)
        padding = torch.randint(prompt, (2,), generator=generator)
        outputs = [cache.prefill(*x.part(0, prompt), padding=padding)]
        outputs += [cache.decode(*x.part(t, t + 1)) for t in range(prompt, prompt + new)]
        seen += prompt + new
        assert all(torch.isfinite(output).all() for output in outputs)
        assert cache.num_seen == seen
        positions = cache.positions
        for row in range(2):
            for head in range(2):
                held = positions[row, head, : int(cache.num_stored[row, head])].tolist()
                assert held == sorted(set(held))
                assert held[-1] == cache.row_seen[row] - 1
