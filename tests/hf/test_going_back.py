"""Tests of turns that broke off, and of going back over decoded tokens."""

import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from conversations import MORE, answered, forward, modes, names
from rocketkv import InputError, LayerCache, RocketKVCache, RocketKVConfig, UnsupportedError, enable
from rocketkv.eviction import KeepAll
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, COMPRESSED_MT, generate, prompts, tiny_model


class Breaks(KeepAll):
    """An eviction that breaks off in the prompt of one layer, once it is armed."""

    def __init__(self) -> None:
        self.left = -1

    def keep(self, *_: Any, **__: Any) -> Tensor | None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return None


@names
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_turn_that_breaks_off_before_any_layer_took_it_in_can_be_made_again(name: str, mode: Any) -> None:
    model, breaks = enable(tiny_model(name)), Breaks()
    config = RocketKVConfig(dense_below=0, token_budget=12, mode=mode, eviction=breaks)
    cache, ids = answered(model, config, prompts(100)[0])
    whole = torch.cat([ids, MORE], 1)
    expected = generate(model, whole, **pass_cache(cache.copy()))
    breaks.left = 1
    with pytest.raises(KeyboardInterrupt):
        generate(model, whole, **pass_cache(cache))
    assert torch.equal(generate(model, whole, **pass_cache(cache)), expected)


@pytest.mark.parametrize("name", ["llama"])
def test_a_turn_that_broke_off_is_told_by_its_layer_and_can_be_taken_back_where_nothing_is_lost(name: str) -> None:
    model, breaks = enable(tiny_model(name)), Breaks()
    for mode in ("single_turn", "multi_turn"):
        config = RocketKVConfig(dense_below=0, token_budget=12, mode=mode, eviction=breaks)
        cache, ids = answered(model, config, prompts(100)[0])
        whole = torch.cat([ids, MORE], 1)
        expected = generate(model, whole, **pass_cache(cache.copy()))
        breaks.left = 2
        with pytest.raises(KeyboardInterrupt):
            generate(model, whole, **pass_cache(cache))
        for refused in (partial(generate, model, whole, **pass_cache(cache)), cache.copy, partial(pickle.dumps, cache)):
            with pytest.raises(InputError, match=r"in layer 1, .* broke off half way; .* or cache.rewind_to\(ids\)"):
                refused()
        if mode == "single_turn":
            with pytest.raises(InputError, match="a single_turn cache goes back over the 0 tokens decoded"):
                cache.rewind_to(whole)
            continue
        assert cache.rewind_to(whole) == 111
        assert torch.equal(generate(model, whole, **pass_cache(cache)), expected)


@modes
def test_an_interrupted_decode_step_can_be_taken_back(config: RocketKVConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable(tiny_model("llama"))
    cache, ids = answered(model, config, prompts(100)[0])
    expected = forward(model, cache.copy(), ids[:, -1:])
    plain, left = LayerCache.decode, [3]

    def interrupted(self: LayerCache, *args: Any, **options: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return plain(self, *args, **options)

    monkeypatch.setattr(LayerCache, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        forward(model, cache, ids[:, -1:])
    with pytest.raises(InputError, match="in layer 2, an earlier forward pass"):
        forward(model, cache, ids[:, -1:])
    assert cache.rewind_to(ids) == 111
    assert torch.equal(forward(model, cache, ids[:, -1:]), expected)


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"archive_on_host": True}], ids=["", "int8", "on host"])
@pytest.mark.parametrize("common", [3, 60, 119, 120, 125, 131])
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_cache_that_went_back_is_one_that_never_saw_more(mode: Any, common: int, options: dict[str, Any]) -> None:
    if mode == "single_turn" and options.get("archive_on_host"):
        pytest.skip("there is no archive")
    model = enable(tiny_model("llama"))
    config = RocketKVConfig(dense_below=0, token_budget=26, mode=mode, window_size=8, kernel_size=5, **options)
    ids, _ = prompts(120)
    cache, text = answered(model, config, ids)
    other = torch.cat([text[:, :common], prompts(40, seed=3)[0]], 1)
    other[:, common] = (text[:, common] + 1) % 100 + 3 if common < 131 else other[:, common]
    fresh = RocketKVCache(model.config, config)
    if mode == "single_turn" and common < 120:
        with pytest.raises(InputError, match="over the 11 tokens decoded since its last prompt only"):
            cache.rewind_to(other)
        assert cache.get_seq_length() == 131
        return
    assert cache.rewind_to(other) == common == cache.get_seq_length()
    forward(model, fresh, text[:, : min(common, 120)])
    for column in range(120, common):
        forward(model, fresh, text[:, column : column + 1])
    fresh.end_turn()
    answers = [generate(model, other, **pass_cache(c)) for c in (cache, fresh)]
    assert torch.equal(*answers)
    steps = [forward(model, c, answers[0][:, -1:]) for c in (cache, fresh)]
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)  # a prompt of other length may round otherwise


@modes
def test_going_back_over_a_long_answer_plans_as_if_it_had_never_been(config: RocketKVConfig) -> None:
    model = enable(tiny_model("llama"))
    config = replace(config, token_budget=26)  # with less, the warning of long rows would come
    ids, _ = prompts(60)
    cache, text = answered(model, config, ids, new=80)  # outgrows its plan on the way
    for left in (100, 75, 60):
        fresh = RocketKVCache(model.config, config)
        forward(model, fresh, ids)
        for column in range(60, left):
            forward(model, fresh, text[:, column : column + 1])
        assert cache.rewind_to(text[:, : left + 1]) == left
        for mine, its in zip(cache.compressed_layers, fresh.compressed_layers, strict=True):
            assert mine.cache.plan is not None
            assert its.cache.plan is not None
            assert mine.cache.plan.splits == its.cache.plan.splits
            assert mine.cache.plan.steps_left == its.cache.plan.steps_left
        steps = [forward(model, c, text[:, left : left + 1]) for c in (cache.copy(), fresh)]
        assert torch.equal(*steps)


def test_an_answer_can_be_given_again() -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(150, 90)
    cache = RocketKVCache(model.config, COMPRESSED_MT)
    first = generate(model, ids, mask, **pass_cache(cache))
    assert cache.rewind_to(ids) == 142  # the last window_size tokens choose anew what is kept
    assert torch.equal(generate(model, ids, mask, **pass_cache(cache)), first)
    assert cache.rewind_to(prompts(40, 40, seed=9)[0]) == 0
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, ids, mask, **pass_cache(cache)), first)


def test_sliding_windows_go_back_only_over_what_they_hold() -> None:
    model = enable(tiny_model("gemma3"))
    cache, text = answered(model, COMPRESSED_MT, prompts(9)[0], new=4)
    other = torch.cat([text[:, :10], MORE], 1)
    other[:, 10] = (text[:, 10] + 1) % 100 + 3
    fresh = RocketKVCache(model.config, COMPRESSED_MT)
    forward(model, fresh, text[:, :9])
    forward(model, fresh, text[:, 9:10])
    assert cache.rewind_to(other) == 10
    assert torch.equal(*(generate(model, other, **pass_cache(c)) for c in (cache, fresh)))
    with pytest.raises(UnsupportedError, match="layer 0 has a sliding window and has dropped what came before"):
        cache.rewind_to(other[:, :20])
    assert cache.get_seq_length() == 30 + 11


def test_what_cannot_go_back_says_so() -> None:
    model = enable(tiny_model("llama"))
    cache, text = answered(model, COMPRESSED_MT, prompts(50)[0])
    for wrong in (text[0], text.float(), text[:, :0], text.tolist()):
        with pytest.raises(InputError, match=r"a tensor of integers \[B, L\]"):
            cache.rewind_to(wrong)
    with pytest.raises(InputError, match="the cache has 1 rows, not 2"):
        cache.rewind_to(text.repeat(2, 1))
    layer = cache.compressed_layers[0].cache
    for wrong in ([0], [62], [30, 30]):
        with pytest.raises(InputError, match=r"rows that have seen \[61\] tokens cannot go back to"):
            layer.rewind(30, wrong)
    assert RocketKVCache(model.config, COMPRESSED).rewind_to(text) == 0
