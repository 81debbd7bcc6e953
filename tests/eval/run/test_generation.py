"""One prefill for all methods, decoded as rows of one batch: each gives what it gives alone, turn after turn."""

import re
from typing import Any

import pytest
import torch

from rocketkv import ConfigError, InputError, RocketKVCache, RocketKVConfig, UnsupportedError, disable, enable
from rocketkv.errors import RocketKVError
from rocketkv.eval.run import generation
from rocketkv.eval.run.generation import SharedPrefill, decode_greedily, forward, stop_ids
from rocketkv.eval.run.methods import METHODS, Arm, make_arms, method_config, sort_methods
from rocketkv.hf.batch import batch_caches, row_stats
from rocketkv.hf.models import LoadedModel
from rocketkv.hf.versions import pass_cache
from tiny import prompts, tiny_model

BUDGET = 40  # of 200 tokens
NEVER: set[int] = set()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def configs() -> list[RocketKVConfig]:
    return [method_config(name, BUDGET, window_size=8, kernel_size=7) for name in METHODS]


def alone(model: Any, config: RocketKVConfig, pieces: list[list[int]], new: int) -> list[list[int]]:
    """Return what a cache of its own answers after each piece, with answers left out of the past."""
    cache, answers = RocketKVCache(model.config, config), []
    for piece in pieces:
        cache.end_turn()
        logits = forward(model, cache, [piece])
        answers.append(decode_greedily(model, batch_caches([cache.copy()]), logits, new, NEVER)[0][0])
    return answers


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_each_method_answers_as_it_does_alone_turn_after_turn(name: str) -> None:
    model = enable(tiny_model(name))
    pieces = [prompts(n, seed=n)[0][0].tolist() for n in (200, 30, 5)]
    shared = SharedPrefill(model, configs())
    expected = [alone(model, config, pieces, 12) for config in configs()]
    for turn, piece in enumerate(pieces):
        shared.take_in(piece)
        answers = shared.answer(12, NEVER)
        assert [a.token_ids for a in answers] == [e[turn] for e in expected]
        assert [a.token_ids for a in shared.answer(12, NEVER)] == [e[turn] for e in expected]
    assert len({tuple(a.token_ids) for a in answers}) > 1  # methods do differ here


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_in_pieces_is_one_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable(tiny_model(name))
    tokens = prompts(200)[0][0].tolist()
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: passes.append(1), with_kwargs=True)
    answers = []
    for piece in (1000, 32):
        monkeypatch.setattr(generation, "PIECE", piece)
        passes.clear()
        shared = SharedPrefill(model, configs())
        shared.take_in(tokens)
        # Only where layers have sliding windows.
        assert len(passes) == (6 if piece == 32 and name == "gemma3" else 1)
        answers.append([a.token_ids for a in shared.answer(12, NEVER)])
    handle.remove()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_rows_of_a_stack_see_what_they_see_alone(name: str) -> None:
    model = enable(tiny_model(name))
    pieces = [[prompts(200, seed=row)[0], prompts(30, seed=10 + row)[0]] for row in range(len(METHODS))]
    steps = torch.randint(3, 128, (len(METHODS), 8), generator=torch.Generator().manual_seed(0))
    caches = [[RocketKVCache(model.config, config) for config in configs()] for _ in range(2)]
    for pair in zip(*caches, pieces, strict=True):
        for cache in pair[:2]:
            forward(model, cache, pair[2][0])
            cache.end_turn()
    stacked = batch_caches(caches[0])
    inputs = [torch.cat([piece[1] for piece in pieces]), *steps.split(1, dim=1)]
    for new in inputs:
        together = forward(model, stacked, new)
        apart = [forward(model, cache, row[None]) for cache, row in zip(caches[1], new, strict=True)]
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)


def test_several_requests_of_one_context_leave_it_as_it_was() -> None:
    model = enable(tiny_model("llama"))
    context, *questions = (prompts(n, seed=n)[0][0].tolist() for n in (200, 20, 25))
    shared = SharedPrefill(model, configs())
    shared.take_in(context)
    held = [layer.cache.working.archive.fields["keys"].clone() for layer in shared._base.compressed_layers]
    for question in [*questions, questions[0]]:
        branch = shared.copy()
        branch.take_in(question)
        expected = [alone(model, config, [context, question], 12)[-1] for config in configs()]
        assert [a.token_ids for a in branch.answer(12, NEVER)] == expected
    length = len(context)
    for layer, keys in zip(shared._base.compressed_layers, held, strict=True):
        assert layer.cache.num_seen == length
        assert torch.equal(layer.cache.working.archive.fields["keys"][:, :, :length], keys[:, :, :length])


def test_a_row_ends_at_a_stop_token_or_at_the_limit_and_the_others_go_on() -> None:
    model = enable(tiny_model("llama"))
    piece = prompts(200)[0][0].tolist()
    shared = SharedPrefill(model, configs())
    shared.take_in(piece)
    whole = [a.token_ids for a in shared.answer(12, NEVER)]
    stop = whole[0][4]
    answers = shared.answer(12, {stop})
    for full, answer in zip(whole, answers, strict=True):
        end = full.index(stop) + 1 if stop in full else 12
        assert answer.token_ids == full[:end]
        assert answer.held.num_seen == 200 + end - 1  # the last token is not taken in
        assert answer.held.read_bytes > 0
    assert len({len(a.token_ids) for a in answers}) > 1
    first = shared.answer(12, {whole[0][0]})
    assert all(a.token_ids == whole[0][:1] for a in first)
    assert all(a.held.read_bytes == 0 for a in first)
    assert all(len(a.token_ids) == 1 for a in shared.answer(1, NEVER))


def test_what_a_row_holds_and_reads_is_its_own() -> None:
    model = enable(tiny_model("gemma3"))
    ids = prompts(200)[0]
    shared = SharedPrefill(model, configs())
    shared.take_in(ids[0].tolist())
    for config, answer in zip(configs(), shared.answer(5, NEVER), strict=True):
        cache = RocketKVCache(model.config, config)
        logits = forward(model, cache, ids)
        decode_greedily(model, batch_caches([cache]), logits, 5, NEVER)
        own = cache.stats()
        for name in ("num_seen", "num_stored", "kv_bytes", "read_bytes"):
            mine = sum(getattr(x, name) for x, y in zip(own.layers, cache.layers, strict=True) if not y.is_sliding)
            window = {"num_seen": 204, "num_stored": 15}.get(name, 2 * 4 * 2 * 32 * 15)
            total = (mine + window) / (3 if name.startswith("num") else 1)
            assert getattr(answer.held, name) == pytest.approx(total), name


def test_batches_are_no_larger_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable(tiny_model("llama"))
    shared = SharedPrefill(model, configs())
    shared.take_in(prompts(200)[0][0].tolist())
    together = shared.answer(8, NEVER)
    batches = []
    monkeypatch.setattr("rocketkv.eval.run.generation.BATCH_BYTES", 4 * shared._base.stats().total.kv_bytes)
    monkeypatch.setattr(
        "rocketkv.eval.run.generation.batch_caches", lambda caches: batches.append(len(caches)) or batch_caches(caches)
    )
    assert shared.answer(8, NEVER) == together
    assert batches == [4, 4, 2]


def test_what_cannot_be_stacked_is_refused() -> None:
    model = enable(tiny_model("llama"))
    caches = [RocketKVCache(model.config, configs()[0]) for _ in range(4)]
    with pytest.raises(InputError, match=r"caches that have seen \[0\] columns cannot be stacked"):
        batch_caches(caches)
    ids, mask = prompts(50, 30)
    forward(model, caches[0], ids[:1])
    with pytest.raises(InputError, match=r"caches that have seen \[0, 50\] columns cannot be stacked"):
        batch_caches(caches[:2])
    forward(model, caches[1], ids)
    model(input_ids=ids[1:], attention_mask=mask[1:], **pass_cache(caches[2]))
    for cache in caches[1:3]:
        with pytest.raises(InputError, match="several rows or with padding cannot be stacked"):
            batch_caches([caches[0], cache])
    with pytest.raises(InputError, match=r"a cache is given twice, whose rows would share their tokens; give its copy"):
        batch_caches([caches[0], caches[0]])
    stacked = batch_caches([caches[0]])
    with pytest.raises(UnsupportedError, match="a stack cannot be forked; fork its caches and stack the forks"):
        stacked.fork(caches[0].config)
    with pytest.raises(UnsupportedError, match="rows of a stack cannot be repeated"):
        stacked.batch_repeat_interleave(2)


def test_a_stack_is_a_cache_for_generate() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(200)
    shared = SharedPrefill(model, configs())
    shared.take_in(ids[0].tolist())
    caches = [shared._base.fork(config) for config in configs()]
    expected = [a.token_ids for a in shared.answer(8, NEVER)]
    rows = torch.cat([ids, torch.tensor([expected[0][:1]])], dim=1).expand(len(caches), -1)
    stacked = batch_caches(caches)
    output = model.generate(
        rows, attention_mask=torch.ones_like(rows), **pass_cache(stacked), max_new_tokens=7, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert output[:, 200:].tolist() == expected
    total = stacked.stats().total
    assert total.kv_bytes == sum(row_stats(stacked, i).total.kv_bytes for i in range(len(caches)))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_copy_of_a_stack_goes_its_own_way(name: str) -> None:
    model = enable(tiny_model(name))
    ids, following = prompts(200)[0], prompts(30, seed=1)[0].expand(len(METHODS), -1)
    caches = [RocketKVCache(model.config, config) for config in configs()]
    for cache in caches:
        forward(model, cache, ids)
    stacked = batch_caches(caches)
    copied = stacked.copy()
    copied.end_turn()
    forward(model, copied, following)
    forward(model, copied, following[:, :1])
    assert (copied.get_seq_length(), stacked.get_seq_length()) == (231, 200)
    kept = torch.tensor([3, 1])
    copied.batch_select_indices(kept)
    stacked.end_turn()
    forward(model, stacked, following)
    forward(model, stacked, following[:, :1])
    expected = forward(model, stacked, following[:, 1:2])[kept]
    torch.testing.assert_close(forward(model, copied, following[kept, 1:2]), expected, rtol=1e-4, atol=1e-4)


def test_arms_are_every_method_at_every_budget_and_the_full_cache_once() -> None:
    arms = make_arms(["snapkv", "full", "quest", "snapkv"], [64, 128])
    assert arms == [Arm("full", None), *(Arm(name, t) for t in (64, 128) for name in ("snapkv", "quest"))]
    assert make_arms(["snapkv"], [64]) == [Arm("snapkv", 64)]
    with pytest.raises(InputError, match=r"method 'h2o' does not exist; choose from full, .*rocketkv_paper\."):
        make_arms(["h2o"], [64])
    with pytest.raises(ConfigError, match="token_budget=16 is smaller than window_size=32"):
        make_arms(["rocketkv"], [16])
    paper = RocketKVConfig.paper(64)
    assert Arm("rocketkv_paper", 64).config() == paper


def test_a_method_takes_options_of_the_configuration() -> None:
    config = method_config("rocketkv:eviction=snapkv:recent_tokens=0:selection=exact:window_size=8", 64)
    expected = RocketKVConfig.paper(64, selection="exact", window_size=8)
    assert config == expected
    names = ["rocketkv:window_size=8", "snapkv", "rocketkv", "full", "snapkv"]
    assert sort_methods(names) == ["full", "snapkv", "rocketkv", "rocketkv:window_size=8"]
    for method, message in [
        ("rocketkv:window_size", "has 'window_size' where an option stands; write, say, rocketkv:window_size=16"),
        ("rocketkv:=3", "has '=3' where an option stands"),
        ("rocketkv:token_budget=3", "has 'token_budget=3' where an option stands"),
        ("rocketkv:windowsize=3", "windowsize is not an option of RocketKVConfig; did you mean window_size?"),
        ("rocketkv:window_size=many", "window_size='many' is not a whole number"),
        ("rocket:window_size=3", "method 'rocket' does not exist"),
    ]:
        with pytest.raises(RocketKVError, match=re.escape(message)):
            make_arms([method], [64])


def test_real_rows_give_the_tokens_they_give_alone(smollm2: LoadedModel) -> None:
    from rocketkv.eval.data.haystack import default_text

    model = enable(smollm2.model)
    try:
        text = default_text()[20000:22000]
        piece = smollm2.tokenizer(text, add_special_tokens=False).input_ids[:300]
        arms = [Arm("full", None), Arm("rocketkv", 64), Arm("quest", 128), Arm("snapkv", 64)]
        shared = SharedPrefill(model, [arm.config() for arm in arms])
        shared.take_in(piece)
        answers = shared.answer(12, stop_ids(smollm2))
        for arm, answer in zip(arms, answers, strict=True):
            cache = RocketKVCache(model.config, arm.config())
            ids = torch.tensor([piece])
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), **pass_cache(cache), max_new_tokens=12, do_sample=False
            )
            assert output[0, 300:].tolist() == answer.token_ids
        assert answers[0].token_ids != answers[3].token_ids
        forked = [shared._base.fork(arm.config()) for arm in arms]
        apart = [forward(model, shared._base.fork(arm.config()), [[piece[0]]]) for arm in arms]
        batched = forward(model, batch_caches(forked), [[piece[0]]] * len(arms))
        torch.testing.assert_close(batched, torch.cat(apart), rtol=1e-3, atol=1e-3)
    finally:
        disable(model)
