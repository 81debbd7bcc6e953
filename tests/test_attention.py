"""The laws of `LayerCache`, against plain loops and against itself, on ragged batches and poisoned memory."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import oracle
from inputs import Inputs, make_inputs
from rocketkv import Budget, ConfigError, InputError, LayerCache, RocketKVConfig, UnsupportedError, ops, split_budget
from rocketkv.eviction import EVICTION_POLICIES, KeepAll
from rocketkv.selection import SELECTION_METHODS, Exact, Hybrid, LowBit

pytestmark = pytest.mark.usefixtures("decoded_by")
ALL_METHODS = [(e, s) for e in EVICTION_POLICIES for s in SELECTION_METHODS]
IN_8_BITS = [("snapkv", "lowbit"), ("snapkv", "hybrid"), ("streaming_llm", "dense")]
WITH_8_BITS = [(*method, "auto") for method in ALL_METHODS] + [(*method, "int8") for method in IN_8_BITS]

strict = partial(RocketKVConfig, dense_below=0)  # selects as soon as a row holds more than top_k


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating-point memory is NaN: a read of what was never written shows in the output."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **options: Any) -> Tensor:
        fresh = new_empty(self, *size, **options)
        if fresh.is_floating_point():
            return fresh.fill_(torch.nan)
        return fresh.fill_(0x5D if fresh.dtype.itemsize == 1 else 1 << 20)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def decode_all(cache: LayerCache, x: Inputs, start: int, stop: int) -> Tensor:
    return torch.cat([cache.decode(*x.part(t, t + 1)) for t in range(start, stop)], dim=2)


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
    cache = LayerCache(strict(token_budget=64, mode=mode, eviction=eviction, selection=selection, **sizes))
    prompt = x.part(0, 400)
    output = cache.prefill(*prompt)
    q, k, v = (a[0].double().numpy() for a in x)
    np.testing.assert_allclose(output[0], oracle.dense(q[:, :400], k[:, :400], v[:, :400]), atol=1e-5)

    kept_count = int(cache.num_stored[0, 0])
    # 420 tokens at 64: c = 6.56, r = 0.363, 212 held, 20 of them new; 1.4 times as many for low-bit keys
    assert kept_count == {"hybrid": 192, "lowbit": 276}[selection]
    scores = oracle.pooled(oracle.window_scores(q[:, :400], k[:, :400], 16, by_peak=eviction == "peak"), 16, 5)
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
    dense.prefill(*x.part(0, 80))
    prompt = scaled_dot_product_attention(*x.part(0, 80), is_causal=True, enable_gqa=True)
    assert torch.equal(cache.prefill(*x.part(0, 80)), prompt)
    for t in range(80, 90):
        key, value = x.key[:, :, : t + 1], x.value[:, :, : t + 1]
        expected = scaled_dot_product_attention(x.query[:, :, t].reshape(2, 2, 3, 64), key, value)
        output = cache.decode(*x.part(t, t + 1))
        assert torch.equal(output, dense.decode(*x.part(t, t + 1)))
        if decoded_by == "reference":
            assert torch.equal(output, expected.reshape(2, 6, 1, 64))
        torch.testing.assert_close(output, expected.reshape(2, 6, 1, 64), rtol=1e-5, atol=1e-5)
    assert cache.working is not None
    assert cache.working.index is None  # nothing to select: no index is paid for


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_what_is_held_is_attended_in_full_up_to_twice_the_budget(seeded: torch.Generator, mode: str) -> None:
    x = make_inputs(seeded, 2, 6, 2, 200, 64)
    padding = torch.tensor([0, 100])  # the second row is alone in being short, once the first has grown
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
    # the first row is long, so that a selection is made; the second holds fewer than top_k tokens
    config = strict(token_budget=150, eviction="keep_all", selection=selection, budget=Budget(290, 2, 64, 100))
    selecting = LayerCache(config)
    dense = LayerCache(strict(token_budget=150, eviction="keep_all", selection="dense"))
    for cache in (selecting, dense):
        cache.prefill(*x.part(0, 290), padding=torch.tensor([0, 200]))
    output, expected = decode_all(selecting, x, 290, 300), decode_all(dense, x, 290, 300)
    torch.testing.assert_close(output[1], expected[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output[0], expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("eviction", "selection", "kv_dtype"), WITH_8_BITS)
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_padded_rows_are_what_they_are_alone(
    seeded: torch.Generator, mode: str, eviction: str, selection: str, kv_dtype: str
) -> None:
    x = make_inputs(seeded, 4, 6, 2, 400, 64)
    methods = {"eviction": eviction, "selection": selection, "kv_dtype": kv_dtype}
    config = strict(token_budget=48, mode=mode, window_size=16, kernel_size=7, **methods)
    padding = torch.tensor([0, 130, 345, 180])  # the third row fits in the budget
    batch = LayerCache(config)
    batch_prompt = batch.prefill(*x.part(0, 380), padding=padding)
    positions, stored = batch.positions, batch.num_stored.clone()
    batch_new = decode_all(batch, x, 380, 400)
    for row, pad in enumerate(padding.tolist()):
        alone, y = LayerCache(config), x.row(row, start=pad)
        prompt = alone.prefill(*y.part(0, 380 - pad))
        torch.testing.assert_close(batch_prompt[row, :, pad:], prompt[0], rtol=1e-4, atol=1e-5)
        assert not batch_prompt[row, :, :pad].any()
        for head in range(2):
            count = int(alone.num_stored[0, head])
            assert stored[row, head] == count
            assert positions[row, head, :count].tolist() == alone.positions[0, head].tolist()
            assert (positions[row, head, count:] == -1).all()
        new = decode_all(alone, y, 380 - pad, 400 - pad)
        torch.testing.assert_close(batch_new[row], new[0], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_padded_later_turns_are_what_they_are_alone(seeded: torch.Generator, mode: str, kv_dtype: str) -> None:
    x = make_inputs(seeded, 2, 4, 2, 500, 64)
    config = strict(token_budget=40, mode=mode, window_size=16, kernel_size=7, kv_dtype=kv_dtype)
    turns = [(0, 300, (0, 120), 8), (308, 60, (25, 0), 8), (376, 9, (0, 3), 5)]  # start, width, padding, new tokens
    batch = LayerCache(config)
    outputs = []
    for start, width, padding, new in turns:
        outputs.append(batch.prefill(*x.part(start, start + width), padding=torch.tensor(padding)))
        outputs.append(decode_all(batch, x, start + width, start + width + new))
    for row in range(2):
        alone = LayerCache(config)
        for turn, (start, width, padding, new) in enumerate(turns):
            pad = padding[row]
            prompt = alone.prefill(*(a[row : row + 1] for a in x.part(start + pad, start + width)))
            torch.testing.assert_close(outputs[2 * turn][row, :, pad:], prompt[0], rtol=1e-3, atol=1e-4)
            part = Inputs(*(a[row : row + 1] for a in x))
            tokens = decode_all(alone, part, start + width, start + width + new)
            torch.testing.assert_close(outputs[2 * turn + 1][row], tokens[0], rtol=1e-3, atol=1e-4)
        assert batch.row_seen[row] == alone.row_seen[0]


def test_multi_turn_attends_densely_and_chooses_anew(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 700, 64)
    config = strict(token_budget=48, mode="multi_turn", window_size=16, kernel_size=7)
    turns, single = LayerCache(config), LayerCache(config)
    turns.prefill(*x.part(0, 500))
    decode_all(turns, x, 500, 520)
    second = turns.prefill(*x.part(520, 700))
    whole = single.prefill(*x)
    torch.testing.assert_close(second, whole[:, :, 520:], rtol=1e-4, atol=1e-5)
    assert torch.equal(turns.positions, single.positions)
    assert turns.num_seen == single.num_seen == 700


def test_single_turn_sees_what_is_left_and_evicts_again(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 500, 64)
    cache = LayerCache(strict(token_budget=48, window_size=16, kernel_size=7))
    cache.prefill(*x.part(0, 400))
    left = cache.positions[0]
    output = cache.prefill(*x.part(400, 500))
    for head in range(2):
        held = torch.cat([left[head], torch.arange(400, 500)])
        q, k, v = (a[0].double().numpy() for a in x)
        expected = oracle.dense(q[2 * head : 2 * head + 2, 400:], k[[head]][:, held], v[[head]][:, held])
        np.testing.assert_allclose(output[0, 2 * head : 2 * head + 2], expected, atol=1e-5)
        assert set(cache.positions[0, head].tolist()) <= set(held.tolist())
    assert cache.num_seen == 500
    assert int(cache.num_stored[0, 0]) < left.shape[1] + 100


def test_the_budget_holds_however_long_the_answer_gets(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 700, 64)
    cache = LayerCache(strict(token_budget=64, window_size=16))
    token_bytes = 2 * 64 * 2 * 4  # keys and values of two KV heads
    cache.prefill(*x.part(0, 30))
    for t in range(30, 700):
        cache.decode(*x.part(t, t + 1))
        assert cache.read_bytes <= 1.2 * 64 * token_bytes, t
    assert int(cache.num_stored[0, 0]) == 700


@pytest.mark.parametrize("selection", ["exact", "quest", "sparq", "hybrid", "hybrid_paper"])
def test_a_batch_reads_what_its_rows_read_alone(seeded: torch.Generator, selection: str) -> None:
    x = make_inputs(seeded, 2, 4, 2, 420, 64)
    config = strict(token_budget=128, selection=selection)
    batch = LayerCache(config)
    batch.prefill(*x.part(0, 400), padding=torch.tensor([0, 290]))
    rows = [LayerCache(config), LayerCache(config)]
    for row, (cache, pad) in enumerate(zip(rows, (0, 290), strict=True)):
        cache.prefill(*x.row(row, pad).part(0, 400 - pad))
    for t in range(400, 420):
        batch.decode(*x.part(t, t + 1))
        for row, cache in enumerate(rows):
            cache.decode(*x.row(row).part(t, t + 1))
        if selection != "quest" or t < 418:  # the short row's page of one token is then indexed with both bounds
            assert batch.read_bytes == sum(cache.read_bytes for cache in rows), t


def test_what_is_kept_and_read_is_what_split_budget_says(seeded: torch.Generator) -> None:
    for length, budget, new in [(400, 48, 0), (400, 48, 30), (130, 120, 0), (90, 100, 20), (60, 40, 200)]:
        x = make_inputs(seeded, 1, 4, 2, length, 64)
        cache = LayerCache(RocketKVConfig.paper(budget, new_tokens=new))
        cache.prefill(*x)
        split = split_budget(length, budget, 64, new_tokens=new)
        assert cache.plan is not None
        assert (int(cache.num_stored[0, 0]), *cache.plan.splits[0]) == split


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


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda keys: torch.ones(keys.shape[:3]), r"returned torch.float32 \[1, 2, 200\]; return torch.bool"),
        (lambda keys: torch.ones(1, 2, 7, dtype=torch.bool), r"returned torch.bool \[1, 2, 7\]; return"),
        (lambda keys: torch.zeros(keys.shape[:3], dtype=torch.bool), "left a row without tokens; keep one at least"),
    ],
)
def test_policies_that_return_nonsense_are_refused(
    seeded: torch.Generator, returned: Callable[[Tensor], Tensor], message: str
) -> None:
    class Nonsense(KeepAll):
        def keep(self, query: Tensor, keys: Tensor, **_: Any) -> Tensor:
            return returned(keys)

    with pytest.raises(InputError, match=message):
        LayerCache(strict(token_budget=48, eviction=Nonsense())).prefill(*make_inputs(seeded))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": Budget(50, 2, 65, 20)}, "budget.num_channels=65 is more than head_dim=64"),
        ({"sink_tokens": 28}, "31 first and last tokens are to be attended always, more than top_k=30"),
    ],
)
def test_options_that_do_not_fit_the_layer_are_refused(
    seeded: torch.Generator, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerCache(strict(token_budget=40, **options)).prefill(*make_inputs(seeded))


@pytest.mark.parametrize("selection", list(SELECTION_METHODS))
def test_a_row_that_stays_when_longer_ones_go_selects_as_it_does_alone(
    decoded_by: str, seeded: torch.Generator, selection: str
) -> None:
    """Alone it is attended in full at first, and selects later; the index must not have missed what came between."""
    x = make_inputs(seeded, 2, 4, 2, 800, 64)
    config = RocketKVConfig.paper(256, eviction="keep_all", selection=selection, new_tokens=200)
    batch, alone = LayerCache(config), LayerCache(config)
    batch.prefill(*x.part(0, 600), padding=torch.tensor([450, 0]))
    alone.prefill(*x.row(0, start=450).part(0, 150))
    batch.decode(*x.part(600, 601))
    alone.decode(*x.row(0).part(600, 601))
    batch.select_rows(torch.tensor([0]))
    mine, expected = (decode_all(cache, x.row(0), 601, 760) for cache in (batch, alone))
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)


def test_pins_that_will_not_fit_once_a_short_row_has_grown_are_refused_at_once(seeded: torch.Generator) -> None:
    """30 + 30 pins fit in the 64 tokens that are all attended now, not in the 48 that are chosen of more."""
    prompt = make_inputs(seeded, num_tokens=40)
    with pytest.raises(ConfigError, match="60 first and last tokens are to be attended always, more than top_k=48"):
        LayerCache(strict(token_budget=64, window_size=8, sink_tokens=30, recent_tokens=30)).prefill(*prompt)
    LayerCache(strict(token_budget=64, window_size=8, sink_tokens=24, recent_tokens=24)).prefill(*prompt)


def test_what_cannot_be_adopted_is_refused(seeded: torch.Generator) -> None:
    _, keys, values = make_inputs(seeded, num_tokens=40)
    with pytest.raises(InputError, match="40 tokens of 39 seen cannot be adopted"):
        LayerCache(strict(token_budget=64)).adopt(keys, values, num_seen=39)
    with pytest.raises(InputError, match="a multi_turn cache keeps every token, so 40 of 50 seen cannot be adopted"):
        LayerCache(strict(token_budget=64, mode="multi_turn")).adopt(keys, values, num_seen=50)


def test_sparq_reads_every_token_whatever_page_size_is_given(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 301, 16)
    budget = Budget(300, 4, 4, 10)
    config = strict(token_budget=100, eviction="keep_all", selection="sparq", budget=budget)
    cache = LayerCache(config)
    cache.prefill(*x.part(0, 300))
    cache.decode(*x.part(300, 301))
    assert cache.read_bytes == 2 * 4 * (301 * 4 + 10 * 2 * 16)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_inference_mode_and_no_grad_may_alternate(seeded: torch.Generator, mode: str, kv_dtype: str) -> None:
    x = make_inputs(seeded, 2, 4, 2, 300, 64)
    config = strict(token_budget=48, mode=mode, kv_dtype=kv_dtype)
    mixed, plain = LayerCache(config), LayerCache(config)
    plain.prefill(*x.part(0, 200))
    with torch.inference_mode():
        mixed.prefill(*x.part(0, 200))
        mixed.decode(*x.part(200, 201))
        mixed.select_rows(torch.tensor([0, 1]))
    plain.decode(*x.part(200, 201))
    assert torch.equal(decode_all(mixed, x, 201, 240), decode_all(plain, x, 201, 240))
    assert torch.equal(mixed.prefill(*x.part(240, 290)), plain.prefill(*x.part(240, 290)))
    assert torch.equal(decode_all(mixed, x, 290, 300), decode_all(plain, x, 290, 300))


class HeadsOfTheirOwn(KeepAll):
    """An eviction policy from outside: each head keeps a number of tokens of its own."""

    def keep(self, query: Tensor, keys: Tensor, *, lengths: Tensor, **_: Any) -> Tensor:
        slots = torch.arange(keys.shape[2])
        first = torch.tensor([10, 150])[: keys.shape[1]]
        return (slots >= lengths[..., None] - 40) & (slots < lengths[..., None]) | (slots < first[:, None])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize(
    ("selection", "kv_dtype"), [*((name, "auto") for name in SELECTION_METHODS), ("lowbit", "int8"), ("hybrid", "int8")]
)
def test_heads_may_keep_different_numbers(seeded: torch.Generator, mode: str, selection: str, kv_dtype: str) -> None:
    x = make_inputs(seeded, 1, 4, 2, 330, 64)
    options = {"mode": mode, "selection": selection, "kv_dtype": kv_dtype, "budget": Budget(60, 2, 32, 30)}
    config = strict(token_budget=48, eviction=HeadsOfTheirOwn(), **options)
    cache = LayerCache(config)
    cache.prefill(*x.part(0, 300))
    assert cache.num_stored.tolist() == [[50, 190]]
    together = decode_all(cache, x, 300, 310)
    second = cache.prefill(*x.part(310, 320))
    together = torch.cat([together, second, decode_all(cache, x, 320, 330)], dim=2)
    assert torch.isfinite(together).all()
    for head in range(2):  # each head is what it is alone
        first = [10, 150][head]

        class Alone(KeepAll):
            def keep(self, query: Tensor, keys: Tensor, *, lengths: Tensor, first: int = first, **_: Any) -> Tensor:
                slots = torch.arange(keys.shape[2])
                return (slots >= lengths[..., None] - 40) & (slots < lengths[..., None]) | (slots < first)

        alone = LayerCache(strict(token_budget=48, eviction=Alone(), **options))
        y = Inputs(x.query[:, 2 * head : 2 * head + 2], x.key[:, [head]], x.value[:, [head]])
        alone.prefill(*y.part(0, 300))
        tokens = decode_all(alone, y, 300, 310)
        tokens = torch.cat([tokens, alone.prefill(*y.part(310, 320)), decode_all(alone, y, 320, 330)], dim=2)
        torch.testing.assert_close(together[:, 2 * head : 2 * head + 2], tokens, rtol=1e-3, atol=1e-4)


def test_a_selection_method_from_outside_works(seeded: torch.Generator) -> None:
    class OtherHybrid(Hybrid):
        calls = 0

        def logits(self, *args: Any, **options: Any) -> Tensor:
            self.calls += 1
            return super().logits(*args, **options)

    x = make_inputs(seeded, 1, 4, 2, 210, 64)
    method = OtherHybrid()
    cache = LayerCache(strict(token_budget=48, selection=method))
    same = LayerCache(strict(token_budget=48, selection="hybrid"))
    for c in (cache, same):
        c.prefill(*x.part(0, 200))
    torch.testing.assert_close(decode_all(cache, x, 200, 210), decode_all(same, x, 200, 210), rtol=1e-4, atol=1e-5)
    assert method.calls == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_in_give_dtypes_out(seeded: torch.Generator, dtype: torch.dtype) -> None:
    x = make_inputs(seeded, 1, 4, 2, 300, 64, dtype)
    single = make_inputs(torch.Generator().manual_seed(0), 1, 4, 2, 300, 64)
    config = strict(token_budget=64, eviction="keep_all", selection="exact")
    cache, reference = LayerCache(config), LayerCache(config)
    assert cache.prefill(*x.part(0, 290)).dtype == dtype
    reference.prefill(*single.part(0, 290))
    output = decode_all(cache, x, 290, 300)
    assert output.dtype == dtype
    expected = decode_all(reference, single, 290, 300)
    assert cache.read_bytes * 4 == reference.read_bytes * x.key.element_size()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)


def test_select_rows_is_a_batch_of_those_rows(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 3, 4, 2, 300, 64)
    padding = torch.tensor([0, 50, 200])
    for mode in ("single_turn", "multi_turn"):
        config = strict(token_budget=40, window_size=16, kernel_size=7, mode=mode)
        cache = LayerCache(config)
        cache.prefill(*x.part(0, 280), padding=padding)
        decode_all(cache, x, 280, 285)
        cache.select_rows(torch.tensor([2, 0, 0]))
        chosen = Inputs(*(a[[2, 0, 0]] for a in x))
        expected = LayerCache(config)
        expected.prefill(*chosen.part(0, 280), padding=padding[[2, 0, 0]])
        decode_all(expected, chosen, 280, 285)
        torch.testing.assert_close(
            decode_all(cache, chosen, 285, 300), decode_all(expected, chosen, 285, 300), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("selection", "kv_dtype"), [*((name, "auto") for name in SELECTION_METHODS), ("lowbit", "int8"), ("dense", "int8")]
)
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 31])])
def test_an_archive_on_the_host_changes_nothing_but_where_tokens_lie(
    seeded: torch.Generator, padding: Tensor | None, selection: str, kv_dtype: str
) -> None:
    x = make_inputs(seeded, 2, 4, 2, 460, 64)
    config = strict(token_budget=64, mode="multi_turn", selection=selection, kv_dtype=kv_dtype)
    caches = [LayerCache(replace(config, archive_on_host=on_host), keep_queries=32) for on_host in (False, True)]

    def same(outputs: list[Tensor]) -> None:
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
        assert torch.equal(caches[0].positions, caches[1].positions)
        assert caches[0].read_bytes == caches[1].read_bytes

    same([cache.prefill(*x.part(0, 300), padding=padding) for cache in caches])
    same([decode_all(cache, x, 300, 350) for cache in caches])
    for cache in caches:
        cache.select_rows(torch.tensor([1, 0]))
    same([cache.prefill(*x.part(350, 400)) for cache in caches])
    same([decode_all(cache, x, 400, 410) for cache in caches])
    caches = [cache.copy() for cache in caches]
    same([decode_all(cache, x, 410, 420) for cache in caches])
    caches = [
        cache.fork(replace(config, archive_on_host=on_host))
        for cache, on_host in zip(caches, (True, False), strict=True)
    ]
    same([cache.prefill(*x.part(420, 450)) for cache in caches])
    caches = [
        cache.fork(replace(config, archive_on_host=on_host))
        for cache, on_host in zip(caches, (False, True), strict=True)
    ]
    same([decode_all(cache, x, 450, 460) for cache in caches])
    working = caches[1].working
    assert working is not None
    assert working.archive is not None
    assert working.source is None
    assert working.archive.max_length == 450
    assert working.num_pending == 10


def test_a_fork_answers_as_if_it_had_seen_everything_itself(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 420, 64)
    shared = LayerCache(strict(token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense"))
    shared.prefill(*x.part(0, 368))
    for selection in SELECTION_METHODS:
        config = strict(token_budget=48, mode="multi_turn", selection=selection)
        fork, alone = shared.fork(config), LayerCache(config)
        fork.prefill(*x.part(368, 400))
        alone.prefill(*x.part(0, 400))
        assert torch.equal(fork.positions, alone.positions)
        torch.testing.assert_close(decode_all(fork, x, 400, 420), decode_all(alone, x, 400, 420), rtol=1e-4, atol=1e-5)
    assert shared.num_seen == 368
    with pytest.raises(InputError, match="nothing was prefilled since this cache was made or forked"):
        shared.fork(config).decode(*x.part(368, 369))
    empty = LayerCache(config).fork(config)
    assert torch.equal(empty.prefill(*x), LayerCache(config).prefill(*x))
    with pytest.raises(InputError, match="a single_turn cache has evicted what a fork would need; set mode='multi"):
        LayerCache(strict(token_budget=48)).fork(config)


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize("prompt", [400, 40])
def test_a_fork_with_kept_queries_is_to_the_bit_a_cache_that_prefilled_by_itself(
    seeded: torch.Generator, mode: str, prompt: int
) -> None:
    x = make_inputs(seeded, 2, 4, 2, 460, 64)
    padding = torch.tensor([0, 30])
    dense = strict(token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense")
    shared = LayerCache(dense, keep_queries=16)
    shared.prefill(*x.part(0, prompt), padding=padding)
    held = [field.clone() for field in shared.working.archive.views()]
    for eviction, selection, kv_dtype in WITH_8_BITS:
        methods = {"eviction": eviction, "selection": selection, "kv_dtype": kv_dtype}
        config = strict(token_budget=24, mode=mode, window_size=16, **methods)
        fork, alone = shared.fork(config), LayerCache(config)
        alone.prefill(*x.part(0, prompt), padding=padding)
        assert torch.equal(fork.positions, alone.positions)
        assert (fork.kv_bytes, fork.num_seen, fork.row_seen) == (alone.kv_bytes, alone.num_seen, alone.row_seen)
        assert torch.equal(decode_all(fork, x, prompt, prompt + 20), decode_all(alone, x, prompt, prompt + 20))
        following = x.part(prompt + 20, prompt + 50)  # the next turn
        assert torch.equal(fork.prefill(*following), alone.prefill(*following))
        assert torch.equal(fork.positions, alone.positions)
        end = prompt + 50, prompt + 60
        assert torch.equal(decode_all(fork, x, *end), decode_all(alone, x, *end))
    assert all(torch.equal(*pair) for pair in zip(held, shared.working.archive.views(), strict=True))


def test_a_fork_at_a_later_turn_sees_all_of_the_past(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 460, 64)
    shared = LayerCache(
        strict(token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense"), keep_queries=16
    )
    shared.prefill(*x.part(0, 300))
    shared.prefill(*x.part(300, 400))
    for eviction, selection, kv_dtype in WITH_8_BITS:
        methods = {"eviction": eviction, "selection": selection, "kv_dtype": kv_dtype}
        config = strict(token_budget=48, mode="multi_turn", window_size=16, **methods)
        fork, alone = shared.fork(config), LayerCache(config)
        alone.prefill(*x.part(0, 300))
        alone.prefill(*x.part(300, 400))
        assert torch.equal(decode_all(fork, x, 400, 420), decode_all(alone, x, 400, 420))
    single = strict(token_budget=48, window_size=16)
    with pytest.raises(InputError, match="would have evicted at an earlier prefill already; fork it after the first"):
        shared.fork(single)
    everything = strict(token_budget=48, window_size=16, eviction="keep_all")
    alone = LayerCache(everything)
    alone.prefill(*x.part(0, 400))
    assert torch.equal(decode_all(shared.fork(everything), x, 400, 420), decode_all(alone, x, 400, 420))
    with pytest.raises(InputError, match="window_size=17 is more than the keep_queries=16 of the cache; make it with"):
        shared.fork(strict(token_budget=48, window_size=17))
    decode_all(shared, x, 400, 401)
    with pytest.raises(InputError, match="needs the last queries of a prefill; make the cache with keep_queries"):
        shared.fork(single)


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize("selection", ["lowbit", "hybrid", "quest", "sparq", "dense"])
def test_8_bits_decode_as_the_numbers_that_they_store(seeded: torch.Generator, selection: str, mode: str) -> None:
    x = make_inputs(seeded, 2, 4, 2, 340, 80)
    rounded = Inputs(x.query, *ops.restore_tokens(*ops.quantize_tokens(x.key, x.value), x.key.dtype))
    assert not torch.equal(x.key, rounded.key)
    options = {"token_budget": 48, "selection": selection, "mode": mode, "budget": Budget(250, 3, 9, 60)}
    stored, plain = LayerCache(strict(kv_dtype="int8", **options)), LayerCache(strict(**options))
    for cache, y in ((stored, x), (plain, rounded)):
        cache.adopt(*y.part(0, 300)[1:], num_seen=300)
    for start in (300, 320):
        outputs = [decode_all(cache, y, start, start + 15) for cache, y in ((stored, x), (plain, rounded))]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
        later = (
            cache.prefill(*rounded.part(start + 15, start + 20)) for cache in (stored, plain)
        )  # sees what is stored
        torch.testing.assert_close(*later, rtol=1e-5, atol=1e-6)
        assert torch.equal(stored.positions, plain.positions)


def test_8_bits_hold_and_read_what_they_say(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 2001, 64, torch.bfloat16)
    caches = {kv_dtype: LayerCache(strict(token_budget=128, kv_dtype=kv_dtype)) for kv_dtype in ("auto", "int8")}
    outputs = [cache.prefill(*x.part(0, 2000)) for cache in caches.values()]
    assert torch.equal(*outputs)  # a first prompt is attended as it comes
    for cache in caches.values():
        cache.decode(*x.part(2000, 2001))
    plain, int8 = caches.values()
    held = [int(cache.num_stored[0, 0]) for cache in (plain, int8)]
    assert held[1] - 1 == 2 * split_budget(2000, 128, 64).prompt_tokens  # one was decoded
    split = LowBit("int8").split(held[1] - 1, 128, 64)
    top_k = split.top_k * 256 // (2 * (64 + 2))  # a token takes 256 bytes in bfloat16
    assert int8.plan.splits[0] == split._replace(top_k=top_k)
    scored = split.num_channels * (held[1] // 64 * 36 + held[1] % 64 * 2) + 4 * 64
    assert int8.read_bytes == 2 * (scored + top_k * 132) <= 2 * 128 * 256
    codes, _, exponents, _ = int8.working.tokens.fields
    assert codes.dtype == torch.int8
    assert exponents.nbytes == codes.nbytes // 16
    assert int8.kv_bytes / held[1] < 0.65 * plain.kv_bytes / held[0]


def test_what_8_bits_cannot_do_is_refused(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 400, 64)
    multi_turn = strict(token_budget=48, mode="multi_turn", kv_dtype="int8")
    cache = LayerCache(multi_turn, keep_queries=32)
    cache.prefill(*x.part(0, 380))
    with pytest.raises(InputError, match="has rounded what a fork without would need; set kv_dtype='auto' in it"):
        cache.fork(strict(token_budget=48))
    alone = LayerCache(multi_turn)  # of what is stored
    alone.prefill(x.query[:, :, :380], *ops.restore_tokens(*cache.working.archive.views(), x.key.dtype))
    assert torch.equal(decode_all(cache.fork(multi_turn), x, 380, 400), decode_all(alone, x, 380, 400))
    for selection in ("exact", Exact()):
        with pytest.raises(ConfigError, match="selection='exact' reads whole keys as they come; set kv_dtype='auto'"):
            strict(token_budget=48, selection=selection, kv_dtype="int8")
    with pytest.raises(ConfigError, match="kv_dtype='int4' does not exist; did you mean int8"):
        strict(token_budget=48, kv_dtype="int4")


def test_a_fork_of_chosen_rows_is_a_batch_of_those_rows(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 3, 4, 2, 420, 64)
    shared = LayerCache(
        strict(token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense"), keep_queries=16
    )
    shared.prefill(*x.part(0, 400))
    shared.select_rows(torch.tensor([2, 0]))
    chosen = Inputs(*(a[[2, 0]] for a in x))
    config = strict(token_budget=48, window_size=16)
    fork, alone = shared.fork(config), LayerCache(config)
    alone.prefill(*chosen.part(0, 400))
    assert torch.equal(decode_all(fork, chosen, 400, 420), decode_all(alone, chosen, 400, 420))


def test_a_fork_of_chosen_rows_takes_in_their_next_turn(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 2, 4, 2, 460, 64)
    config = strict(token_budget=48, mode="multi_turn")
    shared = LayerCache(config)
    shared.prefill(*x.part(0, 400))
    shared.select_rows(torch.tensor([1, 1, 0]))
    chosen = Inputs(*(a[[1, 1, 0]] for a in x))
    fork, alone = shared.fork(config), LayerCache(config)
    alone.prefill(*chosen.part(0, 400))
    assert torch.equal(fork.prefill(*chosen.part(400, 450)), alone.prefill(*chosen.part(400, 450)))
    assert torch.equal(decode_all(fork, chosen, 450, 460), decode_all(alone, chosen, 450, 460))


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_copy_goes_its_own_way(seeded: torch.Generator, mode: str) -> None:
    x = make_inputs(seeded, 1, 4, 2, 420, 64)
    for eviction, selection in ALL_METHODS:
        cache = LayerCache(strict(token_budget=48, mode=mode, eviction=eviction, selection=selection))
        cache.prefill(*x.part(0, 380))
        decode_all(cache, x, 380, 385)
        copied = cache.copy()
        expected = decode_all(cache, x, 385, 400)
        decode_all(copied, Inputs(-x.query, -x.key, -x.value), 385, 390)
        again = cache.copy()
        assert torch.equal(decode_all(cache, x, 400, 420), decode_all(again, x, 400, 420))
        assert cache.num_seen == 420
        assert copied.num_seen == 390
        assert expected.isfinite().all()


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_step_tells_what_it_attended_to(seeded: torch.Generator, mode: str) -> None:
    x = make_inputs(seeded, 2, 4, 2, 260, 64)
    for eviction, selection in ALL_METHODS:
        config = strict(token_budget=40, mode=mode, eviction=eviction, selection=selection)
        cache = LayerCache(config)
        cache.prefill(*x.part(0, 240), padding=torch.tensor([0, 60]))
        for t in range(240, 260):
            attended = torch.ones(2, 2, 300, dtype=torch.bool)
            output = cache.decode(*x.part(t, t + 1), attended=attended)
            for row, start in ((0, 0), (1, 60)):
                keys, values = (a[row, :, start : t + 1] for a in (x.key, x.value))
                assert not attended[row, :, t + 1 - start :].any()
                expected = scaled_dot_product_attention(
                    x.query[row, :, t : t + 1],
                    keys.repeat_interleave(2, 0),
                    values.repeat_interleave(2, 0),
                    attn_mask=attended[row, :, None, : t + 1 - start].repeat_interleave(2, 0),
                )
                torch.testing.assert_close(output[row], expected, rtol=1e-4, atol=1e-5)


def test_reset_forgets(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 300, 64)
    cache = LayerCache(strict(token_budget=48))
    first = cache.prefill(*x)
    cache.reset()
    assert (cache.num_seen, cache.kv_bytes, cache.read_bytes) == (0, 0, 0)
    assert torch.equal(cache.prefill(*x), first)


def test_scale_replaces_the_default(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 300, 64)
    config = strict(token_budget=48)
    scaled, plain = LayerCache(config), LayerCache(config)
    doubled = Inputs(x.query * 2, x.key, x.value)
    torch.testing.assert_close(scaled.prefill(*x.part(0, 290), scale=0.25), plain.prefill(*doubled.part(0, 290)))
    for t in range(290, 300):
        torch.testing.assert_close(scaled.decode(*x.part(t, t + 1), scale=0.25), plain.decode(*doubled.part(t, t + 1)))


def bad(change: Callable[[Inputs], Inputs]) -> Callable[[LayerCache, Inputs], Any]:
    return lambda cache, x: cache.prefill(*change(x))


def test_a_step_of_another_kind_is_checked_and_bound_anew(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 110, 64)
    cache, same = LayerCache(strict(token_budget=48)), LayerCache(strict(token_budget=48))
    for c in (cache, same):
        c.prefill(*x.part(0, 100))
    decode_all(cache, x, 100, 105)
    decode_all(same, x, 100, 105)
    with pytest.raises(InputError, match="differ"):
        cache.decode(x.query[:, :, 105:106].half(), *x.part(105, 106)[1:])
    with pytest.raises(InputError, match="key and value differ"):
        cache.decode(*x.part(105, 106)[:2], x.value[:, :1, 105:106])
    halved = cache.decode(*x.part(105, 106), scale=0.5 * 64**-0.5)
    assert torch.equal(halved, same.decode(0.5 * x.query[:, :, 105:106], *x.part(105, 106)[1:]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(lambda x: x._replace(key=x.key[:, :, 1:])), "do not fit; give"),
        (bad(lambda x: x._replace(value=x.value[..., 1:])), "key and value differ"),
        (bad(lambda x: x._replace(query=x.query[:, :3])), "Hq must be a multiple of Hkv"),
        (bad(lambda x: x._replace(value=x.value.half())), "give one floating-point dtype"),
        (bad(lambda x: Inputs(*(a[:, :, :0] for a in x))), "nothing may be empty"),
        (lambda c, x: c.prefill(*x, padding=torch.tensor([50])), r"padding=\[50\] does not fit; .* from 0 to 49"),
        (lambda c, x: c.prefill(*x, padding=torch.tensor([1, 1])), "one number per row, 1 in all"),
        (
            lambda c, x: c.decode(*x.part(0, 1)),
            "nothing was prefilled since this cache was made or forked; call prefill",
        ),
        (lambda c, x: (c.prefill(*x), c.decode(*x)), "decode takes one token per row, not 50"),
        (lambda c, x: (c.prefill(*x), c.prefill(*(a.repeat(2, 1, 1, 1) for a in x))), "the cache holds batch 1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    seeded: torch.Generator, call: Callable[[LayerCache, Inputs], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(LayerCache(strict(token_budget=48)), make_inputs(seeded, 1, 4, 2, 50, 64))


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_another_dtype_than_the_cache_holds_is_refused(seeded: torch.Generator, kv_dtype: str) -> None:
    x = make_inputs(seeded, 1, 4, 2, 300, 64)
    cache = LayerCache(strict(token_budget=48, mode="multi_turn", kv_dtype=kv_dtype))
    cache.prefill(*x.part(0, 290))
    cache.decode(*x.part(290, 291))
    other = Inputs(*(a.bfloat16() for a in x.part(291, 292)))
    for take_in in (cache.decode, cache.prefill):
        with pytest.raises(
            InputError, match=r"key is torch\.bfloat16, but the cache holds torch\.float32; continue in"
        ):
            take_in(*other)


def test_gradients_are_refused(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 50, 64)
    with pytest.raises(UnsupportedError, match="has no gradients"):
        LayerCache(strict(token_budget=48)).prefill(x.query.requires_grad_(), x.key, x.value)


@pytest.mark.filterwarnings("ignore:a row has grown so long")  # true of the smallest budgets; test_checks.py holds it
@settings(deadline=None, max_examples=40)
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
