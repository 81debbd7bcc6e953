"""Models with attention sinks and soft-capped logits: exact with a large budget, alike in all ways with a small one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import tiny_config
from rocketkv import Budget, CacheFileError, RocketKVCache, RocketKVConfig, compile, disable, enable
from rocketkv.hf import batch_caches
from rocketkv.hf.interface import NAMES
from rocketkv.hf.versions import pass_cache
from tiny import EVERYTHING, SMALL, generate, prompts

KINDS = ("gpt_oss", "granite_swa", "mimo_v2_flash", "gemma2", "vaultgemma")
COMPRESSED = {"dense_below": 0, "token_budget": 16, "budget": Budget(36, 1, 4, 12), **SMALL}
every_kind = pytest.mark.parametrize("kind", KINDS)


def model_with_terms(kind: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny model whose terms matter: sinks as large as logits, and a cap below them."""
    config = tiny_config(kind)
    config.sliding_window = 16
    config.initializer_range = 0.2  # so that the attention's output counts beside the embeddings
    for name, value in changes.items():
        setattr(config, name, value)
    if hasattr(config, "attn_logit_softcapping"):
        config.attn_logit_softcapping = 0.5
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(weight, std=2.0)
    return model


@every_kind
def test_turns_beams_and_padded_rows_are_those_of_plain_generate(kind: str) -> None:
    model = model_with_terms(kind)
    ids, mask = prompts(40, 23)
    more = prompts(9, 9, seed=1)[0]
    first = generate(model, ids, mask, new=8)
    turn, turn_mask = torch.cat([first, more], 1), torch.cat([mask, torch.ones(2, 17, dtype=torch.int64)], 1)
    expected = [first, generate(model, turn, turn_mask, new=8), generate(model, ids, mask, new=8, num_beams=3)]
    enable(model)
    assert torch.equal(generate(model, ids, mask, new=8), first)
    cache, beams = (RocketKVCache(model.config, EVERYTHING) for _ in range(2))
    assert torch.equal(generate(model, ids, mask, new=8, **pass_cache(cache)), first)
    assert torch.equal(generate(model, turn, turn_mask, new=8, **pass_cache(cache)), expected[1])
    assert torch.equal(generate(model, ids, mask, new=8, num_beams=3, **pass_cache(beams)), expected[2])
    assert disable(model).config._attn_implementation == "eager"


@every_kind
def test_a_small_budget_gives_the_same_in_every_way(kind: str, tmp_path: Path) -> None:
    model = enable(model_with_terms(kind))
    ids, mask = prompts(60, 43)
    configs = {name: RocketKVConfig(backend=name, **COMPRESSED) for name in ("auto", "reference")}
    caches = {name: RocketKVCache(model.config, config) for name, config in configs.items()}
    tokens = {name: generate(model, ids, mask, new=12, **pass_cache(cache)) for name, cache in caches.items()}
    assert torch.equal(tokens["auto"], tokens["reference"])
    layer = caches["auto"].compressed_layers[0].cache
    assert int(layer.plan.top_k.max()) < int(layer.num_stored.min())  # the steps selected
    alone = RocketKVCache(model.config, configs["auto"])
    assert torch.equal(generate(model, ids[1:, 17:], new=12, **pass_cache(alone))[0, 43:], tokens["auto"][1, 60:])
    alone.save(tmp_path / "cache")
    loaded = RocketKVCache.load(tmp_path / "cache", model)
    again = torch.cat([ids[1:, 17:], tokens["auto"][1:, 60:], prompts(5)[0]], 1)
    assert torch.equal(generate(model, again, **pass_cache(loaded)), generate(model, again, **pass_cache(alone)))


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2"])
def test_rows_of_a_stack_have_the_terms(kind: str) -> None:
    model = enable(model_with_terms(kind).double())  # in float32 a batch of two rounds otherwise than a row
    model.set_experts_implementation("eager")  # the grouped products of gpt-oss know no float64
    ids, _ = prompts(40, 40)
    alone = [RocketKVCache(model.config, RocketKVConfig(**COMPRESSED)) for _ in range(2)]
    with torch.inference_mode():
        for row, cache in enumerate(alone):
            model(ids[row : row + 1, :-1], **pass_cache(cache))
        expected = [
            model(ids[row : row + 1, -1:], **pass_cache(cache.copy())).logits for row, cache in enumerate(alone)
        ]
        logits = model(ids[:, -1:], **pass_cache(batch_caches(alone))).logits
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-10)


def test_a_fork_and_a_file_of_it_know_the_terms_of_the_prompt(tmp_path: Path) -> None:
    model = enable(model_with_terms("gpt_oss"))
    ids, _ = prompts(60)
    multi_turn = RocketKVConfig(dense_below=0, token_budget=4096, mode="multi_turn")
    small = RocketKVConfig(mode="multi_turn", **COMPRESSED)
    base, expected = RocketKVCache(model.config, multi_turn, keep_queries=8), RocketKVCache(model.config, small)
    with torch.inference_mode():
        model(ids, **pass_cache(base))
        model(ids, **pass_cache(expected))
    base.save(tmp_path / "cache")
    for cache in (base, RocketKVCache.load(tmp_path / "cache", model)):
        for mine, its in zip(cache.fork(small).compressed_layers, expected.compressed_layers, strict=True):
            assert torch.equal(mine.cache.positions, its.cache.positions)
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks += 1.0
    with pytest.raises(CacheFileError, match="other weights than the model at hand"):
        RocketKVCache.load(tmp_path / "cache", model)


@pytest.mark.usefixtures("uncompiled_graph")
@pytest.mark.parametrize("kind", ["granite_swa", "gemma2"])
def test_a_compiled_step_has_the_terms(kind: str) -> None:
    model = enable(model_with_terms(kind, layer_types=["full_attention"] * 2))
    ids, _ = prompts(40)
    expected = generate(model, ids, new=6, **pass_cache(RocketKVCache(model.config, EVERYTHING)))
    torch._dynamo.reset()
    counters.clear()
    compile(model)
    assert torch.equal(generate(model, ids, new=6, **pass_cache(RocketKVCache(model.config, EVERYTHING))), expected)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_model_with_terms_in_another_implementation_runs_as_eager() -> None:
    model = model_with_terms("gemma2")
    model.set_attn_implementation("flex_attention")
    assert enable(model).config._attn_implementation == NAMES["eager"]
    assert disable(model).config._attn_implementation == "flex_attention"
