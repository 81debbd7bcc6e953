"""Tests of models whose last layers attend to the cache of an earlier one (Gemma 3n, Gemma 4 E2B and E4B)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from families import SHARED, enabled_model
from rocketkv import RocketKVCache, RocketKVConfig, UnsupportedError, enable
from rocketkv.hf.batch import batch_caches
from rocketkv.hf.support import shared_layers
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, COMPRESSED_MT, EVERYTHING, GROUPED, SMALL, generate, prompts

SIXTEEN = RocketKVConfig(dense_below=0, token_budget=16, **SMALL)
kinds = pytest.mark.parametrize("kind", SHARED)


def two_turns(kind: str, cache: DynamicCache, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the text after each of two turns, of which the second one is padded, in the midst of the text."""
    model, (new, new_mask) = enabled_model(kind), prompts(9, 5, seed=1)
    first = generate(model, ids, mask, new=5, **pass_cache(cache))
    longer = torch.cat([mask, torch.ones(ids.shape[0], 5, dtype=torch.int64), new_mask], 1)
    second = generate(model, torch.cat([first, new], 1), longer, new=5, **pass_cache(cache))
    return first, second


@kinds
@pytest.mark.parametrize("config", [EVERYTHING, RocketKVConfig(token_budget=4096, mode="multi_turn")])
def test_a_budget_for_everything_gives_the_tokens_of_a_full_cache(kind: str, config: RocketKVConfig) -> None:
    model = enabled_model(kind)
    assert shared_layers(model.config) == {2: 0, 3: 1, 4: 0, 5: 1}
    ids, mask = prompts(40, 25)
    plain = two_turns(kind, DynamicCache(config=model.config), ids, mask)
    ours = two_turns(kind, RocketKVCache(model.config, config), ids, mask)
    assert all(torch.equal(*pair) for pair in zip(plain, ours, strict=True))


@kinds
@torch.inference_mode()
def test_logits_of_a_prompt_are_those_of_a_full_cache_however_many_are_kept(kind: str) -> None:
    model = enabled_model(kind)
    ids, mask = prompts(40, 25)  # the first row fills more than a sliding window, a text of 12 tokens does not
    for text, its_mask in ((ids, mask), (ids[:, -12:], None)):
        plain = model(input_ids=text, attention_mask=its_mask).logits[:, -9:]
        for kept in (0, 1, 5):
            cache = RocketKVCache(model.config, SIXTEEN)  # a prompt is exact with any budget
            own = model(input_ids=text, attention_mask=its_mask, logits_to_keep=kept, **pass_cache(cache)).logits
            wanted = slice(-(kept or 9), None)
            torch.testing.assert_close(own[:, wanted], plain[:, wanted], atol=1e-3, rtol=1e-3)
            assert all(layer.cache.prompt is None for layer in cache.compressed_layers)


@kinds
@pytest.mark.parametrize("config", [COMPRESSED, COMPRESSED_MT], ids=["single_turn", "multi_turn"])
def test_copies_forks_rows_files_and_stacks_go_their_own_way(kind: str, config: RocketKVConfig, tmp_path: Path) -> None:
    model = enabled_model(kind)
    cache = RocketKVCache(model.config, config)
    ids = generate(model, *prompts(60, 60), new=4, **pass_cache(cache))
    whole = torch.cat([ids, prompts(9, 9, seed=1)[0]], 1)
    cache.save(tmp_path / "cache.kv")
    others = [cache.copy(), RocketKVCache.load(tmp_path / "cache.kv", model)]
    others += [cache.fork(config)] if config is COMPRESSED_MT else []
    factors = [other.stats().total.compression_factor for other in (others[1], cache)]
    assert factors[0] == factors[1] > 1
    rows = [cache.copy(), cache.copy()]
    for i, row in enumerate(rows):
        row.batch_select_indices(torch.tensor([i]))
    expected = generate(model, whole, new=4, **pass_cache(cache))
    for other in [*others, batch_caches(rows)]:
        assert torch.equal(generate(model, whole, new=4, **pass_cache(other)), expected)


def test_reads_of_all_layers_count() -> None:
    model = enabled_model(SHARED[0])
    cache = RocketKVCache(model.config, EVERYTHING)
    generate(model, prompts(40)[0], new=4, **pass_cache(cache))
    layer = cache.stats().layers[1]
    assert layer.read_bytes == layer.full_read_bytes == 3 * layer.full_kv_bytes
    assert layer.num_stored == layer.num_seen == 43


def test_layers_that_share_in_other_models_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED, num_kv_shared_layers=1))
    with pytest.raises(UnsupportedError, match="some of its layers share the cache of others"):
        enable(model)
