"""Tests of models with recurrent states beside their full attention: states go wherever the tokens go, but not back."""

import copy
import pickle
from pathlib import Path

import pytest
import torch

from families import HYBRIDS as KINDS
from families import enabled_model
from rocketkv import InputError, PrefixStore, RocketKVCache, RocketKVConfig, UnsupportedError
from rocketkv.hf.batch import batch_caches, row_stats
from rocketkv.hf.states import read_states
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, COMPRESSED_MT, generate, prompts

MORE = prompts(9, 9, seed=1)[0]
some_kinds = pytest.mark.parametrize("kind", KINDS[:2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [COMPRESSED, COMPRESSED_MT], ids=["single_turn", "multi_turn"])
def test_copies_forks_rows_and_files_go_their_own_way(kind: str, config: RocketKVConfig, tmp_path: Path) -> None:
    model = enabled_model(kind)
    cache = RocketKVCache(model.config, config)
    ids = generate(model, *prompts(60, 60), new=4, **pass_cache(cache))
    whole = torch.cat([ids, MORE], 1)
    cache.save(tmp_path / "cache.kv")
    copies = [copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    copies += [RocketKVCache.load(tmp_path / "cache.kv", model), RocketKVCache.load(tmp_path / "cache.kv", model)]
    copies += [cache.fork(config)] if config is COMPRESSED_MT else []
    turned = cache.copy()
    turned.batch_select_indices(torch.tensor([1, 0, 1]))
    expected = generate(model, whole, new=4, **pass_cache(cache))
    for copied in copies:
        assert torch.equal(generate(model, whole, new=4, **pass_cache(copied)), expected)
    rows = [1, 0, 1]
    assert torch.equal(generate(model, whole[rows], new=4, **pass_cache(turned)), expected[rows])
    cache.reset()
    assert cache.stats().total.kv_bytes == 0
    assert torch.equal(generate(model, *prompts(60, 60), new=4, **pass_cache(cache)), ids)


@some_kinds
def test_states_count_as_bytes_and_not_as_tokens(kind: str) -> None:
    model = enabled_model(kind)
    cache = RocketKVCache(model.config, COMPRESSED)
    generate(model, prompts(60)[0], new=4, **pass_cache(cache))
    stats, states = cache.stats(), sum(x.nbytes for layer in cache.layers for x in read_states(layer).values())
    assert states > 0
    assert stats.total.num_seen == 63
    assert stats.total.kv_bytes > states
    for layer, own in zip(cache.layers, stats.layers, strict=True):
        assert own.kv_bytes >= sum(x.nbytes for x in read_states(layer).values())


@some_kinds
def test_what_would_go_back_is_refused(kind: str) -> None:
    model = enabled_model(kind)
    ids, mask = prompts(40, 25)
    cache = RocketKVCache(model.config, COMPRESSED_MT)
    first = generate(model, ids, mask, new=4, **pass_cache(cache))
    before = cache.copy()
    for text in (first[:, :30], torch.cat([first[:, :40], MORE], 1)):
        with pytest.raises(UnsupportedError, match=r"layer \d keeps recurrent states, .* cannot go back to an earlier"):
            cache.rewind_to(text)
    with pytest.raises((UnsupportedError, ValueError), match="assisted"):  # transformers may refuse it first
        generate(model, ids[:1], prompt_lookup_num_tokens=3, **pass_cache(RocketKVCache(model.config, COMPRESSED)))
    more, more_mask = prompts(9, 4, seed=1)
    longer = torch.cat([mask, torch.ones(2, 4, dtype=torch.int64), more_mask], 1)
    with pytest.raises(UnsupportedError, match="padding came after tokens, and this model's recurrent states"):
        generate(model, torch.cat([first, more], 1), longer, **pass_cache(cache))
    assert cache.rewind_to(torch.cat([first, MORE], 1)) == 43  # nothing is forgotten
    answers = [
        generate(
            model,
            torch.cat([first, MORE], 1),
            torch.cat([longer[:, :44], torch.ones_like(MORE)], 1),
            new=4,
            **pass_cache(c),
        )
        for c in (cache, before)
    ]
    assert torch.equal(*answers)
    assert cache.rewind_to(MORE) == 0  # nothing in common: begins anew


@some_kinds
def test_a_pass_that_broke_off_cannot_be_made_good(kind: str) -> None:
    model = enabled_model(kind)
    cache = RocketKVCache(model.config, COMPRESSED_MT)
    ids = generate(model, prompts(40)[0], new=4, **pass_cache(cache))
    with torch.inference_mode():
        handle = model.get_decoder().layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=MORE[:1], **pass_cache(cache))
        handle.remove()
    longer = torch.cat([ids, MORE[:1]], 1)
    with pytest.raises(InputError, match=r"broke off half way; call cache\.reset\(\) and start anew\."):
        generate(model, longer, **pass_cache(cache))
    with pytest.raises(UnsupportedError, match="keeps recurrent states"):
        cache.rewind_to(longer)


def test_a_store_goes_on_from_whole_texts_only() -> None:
    model = enabled_model("qwen3_next")
    store = PrefixStore(model, COMPRESSED_MT)
    ids = prompts(60)[0]
    cache = store.get(ids)
    first = generate(model, ids, new=4, **pass_cache(cache))
    store.put(cache)
    longer = torch.cat([first, MORE[:1]], 1)
    assert store.get(longer).get_seq_length() == 63
    assert store.get(torch.cat([first[:, :50], MORE[:1]], 1)).get_seq_length() == 0
    expected = generate(model, longer, new=4, **pass_cache(cache))
    assert torch.equal(generate(model, longer, new=4, **pass_cache(store.get(longer))), expected)


def test_a_stack_has_the_states_of_its_rows() -> None:
    model = enabled_model("qwen3_next")
    caches = [RocketKVCache(model.config, COMPRESSED_MT) for _ in range(2)]
    texts = [generate(model, prompts(40, seed=i)[0], new=4, **pass_cache(cache)) for i, cache in enumerate(caches)]
    whole = torch.cat([torch.cat(texts), MORE], 1)
    alone = [generate(model, whole[i : i + 1], new=4, **pass_cache(cache.copy())) for i, cache in enumerate(caches)]
    stack = batch_caches(caches)
    assert row_stats(stack, 0).layers[0].kv_bytes == caches[0].stats().layers[0].kv_bytes
    assert torch.equal(generate(model, whole, new=4, **pass_cache(stack)), torch.cat(alone))
    model = enabled_model("falcon_h1")
    caches = [RocketKVCache(model.config, COMPRESSED_MT) for _ in range(2)]
    for cache in caches:
        generate(model, prompts(40)[0], new=4, **pass_cache(cache))
    with pytest.raises(UnsupportedError, match="keep states beside their tokens, so its caches do not stack"):
        batch_caches(caches)


def test_states_that_start_anew_and_positions_from_0_are_refused() -> None:
    model = enabled_model("jamba")
    cache = RocketKVCache(model.config, COMPRESSED)
    ids = generate(model, prompts(40)[0], new=4, **pass_cache(cache))
    with pytest.raises(UnsupportedError, match="the recurrent states of JambaModel start anew at each prompt"):
        generate(model, torch.cat([ids, MORE[:1]], 1), **pass_cache(cache))
    generate(model, ids, new=4, **pass_cache(cache))  # one more token is no prompt
    model = enabled_model("bamba")
    cache = RocketKVCache(model.config, COMPRESSED)
    ids = generate(model, prompts(40)[0], new=4, **pass_cache(cache))
    with torch.inference_mode(), pytest.raises(InputError, match="BambaModel counts positions from 0 in each forward"):
        model(input_ids=MORE[:1], **pass_cache(cache))
