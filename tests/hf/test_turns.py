"""Tests of turns, forks and copies of a cache inside a model."""

import copy
import io
import pickle

import pytest
import torch
from transformers import (
    DynamicCache,
)

from conversations import MORE, answered, architectures, modes, names
from rocketkv import InputError, RocketKVCache, RocketKVConfig, enable
from rocketkv.hf.batch import batch_caches
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, COMPRESSED_MT, EVERYTHING, generate, prompts, tiny_model


@architectures
def test_a_second_generate_is_the_next_turn(name: str) -> None:
    model = tiny_model(name)
    first, _ = prompts(90)
    more, _ = prompts(25, seed=1)
    enable(model)
    answers = []
    for cache in (DynamicCache(config=model.config), RocketKVCache(model.config, EVERYTHING)):
        ids = generate(model, first, **pass_cache(cache))
        answers.append(generate(model, torch.cat([ids, more], 1), **pass_cache(cache)))
    assert torch.equal(*answers)
    for config in (COMPRESSED, COMPRESSED_MT):
        cache = RocketKVCache(model.config, config)
        ids = generate(model, first, **pass_cache(cache))
        generate(model, torch.cat([ids, more], 1), **pass_cache(cache))
        assert cache.get_seq_length() == 90 + 12 + 25 + 11
        layer = cache.compressed_layers[-1].cache
        assert layer.num_seen == 138
        if config is COMPRESSED_MT:
            assert layer.working is not None
            assert layer.working.archive is not None
            assert layer.working.archive.max_length == 138


def test_a_second_turn_of_a_padded_batch() -> None:
    model = tiny_model("llama")
    ids, mask = prompts(90, 40)
    more, more_mask = prompts(20, 31, seed=1)
    enable(model)
    outputs = []
    for cache in (DynamicCache(config=model.config), RocketKVCache(model.config, EVERYTHING)):
        first = generate(model, ids, mask, **pass_cache(cache))
        whole_mask = torch.cat([mask, torch.ones(2, 12, dtype=torch.int64), more_mask], 1)
        outputs.append(generate(model, torch.cat([first, more], 1), whole_mask, **pass_cache(cache)))
    assert torch.equal(*outputs)


def test_reset_and_reuse() -> None:
    model = enable(tiny_model("gemma3"))
    ids, mask = prompts(150, 60)
    cache = RocketKVCache(model.config, COMPRESSED)
    first = generate(model, ids, mask, **pass_cache(cache))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.stats().total.kv_bytes == 0
    assert torch.equal(generate(model, ids, mask, **pass_cache(cache)), first)


def test_a_prompt_in_chunks_is_exact_in_multi_turn_and_warned_of_in_single_turn() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(120)
    whole = generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED_MT)))
    chunked = RocketKVCache(model.config, COMPRESSED_MT)
    assert torch.equal(generate(model, ids, **pass_cache(chunked), prefill_chunk_size=50), whole)
    for config, size in ((COMPRESSED, 50), (COMPRESSED_MT, 117)):  # a last chunk of 3 does not fill the window of 8
        cache = RocketKVCache(model.config, config)
        with pytest.warns(UserWarning, match="a second prompt before any token was decoded"):
            generate(model, ids, **pass_cache(cache), prefill_chunk_size=size)


def test_a_fork_of_a_shared_prefill_gives_the_same_tokens() -> None:
    model = enable(tiny_model("gemma3"))
    ids, _ = prompts(200)
    shared = RocketKVCache(
        model.config,
        RocketKVConfig(dense_below=0, token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense"),
    )
    with torch.inference_mode():
        model(input_ids=ids[:, :-8], **pass_cache(shared))
    alone = generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED_MT)))
    for _ in range(2):
        assert torch.equal(generate(model, ids, **pass_cache(shared.fork(COMPRESSED_MT))), alone)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_fork_with_kept_queries_decodes_at_once(name: str) -> None:
    model = enable(tiny_model(name))
    ids, _ = prompts(200)
    dense = RocketKVConfig(
        dense_below=0, token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense", window_size=8
    )
    shared = RocketKVCache(model.config, dense, keep_queries=8)
    with torch.inference_mode():
        first = model(input_ids=ids, **pass_cache(shared)).logits[:, -1].argmax(-1)
        for config in (COMPRESSED, COMPRESSED_MT):
            alone = RocketKVCache(model.config, config)
            assert torch.equal(model(input_ids=ids, **pass_cache(alone)).logits[:, -1].argmax(-1), first)
            fork, token = shared.fork(config), first[:, None]
            for _ in range(10):
                logits = [model(input_ids=token, **pass_cache(cache)).logits for cache in (fork, alone)]
                assert torch.equal(*logits)
                token = logits[0].argmax(-1)


def test_a_copy_of_a_cache_goes_its_own_way() -> None:
    model = enable(tiny_model("gemma3"))
    ids, _ = prompts(200)
    for config in (COMPRESSED, COMPRESSED_MT):
        cache = RocketKVCache(model.config, config)
        following = torch.cat([generate(model, ids, **pass_cache(cache), new=3), prompts(17, seed=1)[0]], 1)
        copies = [cache.copy(), copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        answers = [generate(model, following, **pass_cache(c)) for c in copies]
        assert all(torch.equal(answer, answers[0]) for answer in answers)
        assert cache.get_seq_length() == 202
        assert torch.equal(generate(model, following, **pass_cache(cache)), answers[0])


def test_a_turn_that_ended_may_be_followed_by_another() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(200)
    cache = RocketKVCache(model.config, COMPRESSED)
    with torch.inference_mode():
        model(input_ids=ids, **pass_cache(cache))
        cache.end_turn()
        model(input_ids=ids[:, :5], **pass_cache(cache))  # no warning of chunks, which would be an error here
        with pytest.warns(UserWarning, match="a second prompt before any token was decoded"):
            model(input_ids=ids[:, :5], **pass_cache(cache))


@names
@modes
def test_copies_of_every_kind_are_independent(name: str, config: RocketKVConfig) -> None:
    model = enable(tiny_model(name))
    cache = RocketKVCache(model.config, config)
    assert not cache.is_initialized
    ids = generate(model, prompts(150)[0], **pass_cache(cache))
    assert cache.is_initialized
    whole = torch.cat([ids, MORE], 1)
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    copies = [
        copy.copy(cache),
        copy.deepcopy(cache),
        pickle.loads(pickle.dumps(cache)),
        torch.load(buffer, weights_only=False),
    ]
    expected = generate(model, whole, **pass_cache(cache.copy()))
    for copied in copies:
        assert torch.equal(generate(model, whole, **pass_cache(copied)), expected)
        assert cache.get_seq_length() == 161


def test_a_stack_knows_what_its_rows_have_taken_in() -> None:
    model = enable(tiny_model("llama"))
    (one, a), (two, b) = (answered(model, COMPRESSED, prompts(50, seed=seed)[0]) for seed in (1, 2))
    stacked = batch_caches([one, two])
    with pytest.raises(InputError, match="differs from them at token 0"):
        generate(model, torch.cat([torch.cat([b, a]), MORE.repeat(2, 1)], 1), **pass_cache(stacked))
    texts = torch.cat([torch.cat([a, b]), MORE.repeat(2, 1)], 1)
    assert stacked.rewind_to(texts[:, :56]) == 55
    assert stacked.rewind_to(texts) == 55
    generate(model, texts, **pass_cache(stacked))
