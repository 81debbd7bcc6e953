"""Tests of prompts with an image: two turns of a padded batch, a small budget alone and in a batch, what is kept."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from families import enabled_model
from rocketkv import RocketKVCache, RocketKVConfig, UnsupportedError, backends
from rocketkv.hf.batch import batch_caches
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, EVERYTHING, SMALL, generate, prompts
from vision import IMAGE, MODELS, seeing_model, seen_prompt

SIXTEEN = RocketKVConfig(dense_below=0, token_budget=16, **SMALL)
ALL_TURNS = RocketKVConfig(dense_below=0, token_budget=4096, mode="multi_turn", **SMALL)
MORE = prompts(9, 9, seed=3)[0].clamp(max=IMAGE - 1)
kinds = pytest.mark.parametrize("kind", list(MODELS))


def longer(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return a conversation with the next question at its end, and its mask."""
    whole = torch.cat([text, MORE[: text.shape[0]]], 1)
    return whole, torch.cat([mask, torch.ones(mask.shape[0], whole.shape[1] - mask.shape[1], dtype=torch.int64)], 1)


@kinds
def test_a_second_turn_goes_on_from_an_image_as_in_one_text(kind: str) -> None:
    model = seeing_model(kind)
    ids, mask, image = seen_prompt(kind, 40, 25)
    turns = []
    for cache in (DynamicCache(config=model.config), RocketKVCache(model.config, EVERYTHING)):
        first = generate(model, ids, mask, new=4, **pass_cache(cache), **image)
        turns.append((first, generate(model, *longer(first, mask), new=4, **pass_cache(cache))))
    assert all(torch.equal(*pair) for pair in zip(*turns, strict=True))
    assert not torch.equal(generate(model, ids, mask, new=4), turns[0][0])  # the image matters
    whole, whole_mask = longer(turns[1][0], mask)
    image |= {name: (whole == IMAGE).to(torch.int64) for name in image if name.endswith("token_type_ids")}
    assert torch.equal(generate(model, whole, whole_mask, new=4, **image), turns[1][1])


@kinds
def test_beams_see_the_image(kind: str) -> None:
    model = seeing_model(kind)
    ids, mask, image = seen_prompt(kind, 40, 25)
    caches = DynamicCache(config=model.config), RocketKVCache(model.config, EVERYTHING)
    plain, ours = (generate(model, ids, mask, new=3, num_beams=2, **pass_cache(cache), **image) for cache in caches)
    assert torch.equal(plain, ours)


@kinds
def test_a_small_budget_answers_alike_by_any_backend_alone_or_in_a_batch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeing_model(kind)
    ids, mask, image = seen_prompt(kind, 40, 25)
    batch = generate(model, ids, mask, new=4, **pass_cache(RocketKVCache(model.config, SIXTEEN)), **image)
    first = {name: value[: value.shape[0] // 2] for name, value in image.items()}
    alone = generate(model, ids[:1], mask[:1], new=4, **pass_cache(RocketKVCache(model.config, SIXTEEN)), **first)
    assert torch.equal(batch[:1], alone)
    monkeypatch.setattr(backends, "BACKENDS", ())
    reference = generate(model, ids, mask, new=4, **pass_cache(RocketKVCache(model.config, SIXTEEN)), **image)
    assert torch.equal(batch, reference)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_each_conversation_has_its_own_positions(kind: str, tmp_path: Path) -> None:
    model = seeing_model(kind)
    ids, mask, image = seen_prompt(kind, 40, 40)
    cache = RocketKVCache(model.config, ALL_TURNS)
    first = generate(model, ids, mask, new=4, **pass_cache(cache), **image)
    cache.save(tmp_path / "cache.kv")
    copied, expected = cache.copy(), generate(model, *longer(first, mask), new=4, **pass_cache(cache))
    other = RocketKVCache(model.config, ALL_TURNS)
    for again in (copied, RocketKVCache.load(tmp_path / "cache.kv", model)):
        generate(model, *prompts(20), new=1, **pass_cache(other))  # without an image
        other.reset()
        assert torch.equal(generate(model, *longer(first, mask), new=4, **pass_cache(again)), expected)
    with pytest.raises(UnsupportedError, match="images have moved the positions of this text"):
        cache.rewind_to(first[:, :30])


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_statistics_tell_images_from_text(kind: str) -> None:
    model, num_tokens = seeing_model(kind), MODELS[kind][-1]
    ids, mask, image = seen_prompt(kind, 200, 130)
    cache = RocketKVCache(model.config, COMPRESSED)
    assert cache.stats().total.num_image_seen == 0
    generate(model, ids, mask, new=3, **pass_cache(cache), **image)
    stats = cache.stats()
    for layer, own in zip(cache.compressed_layers, stats.layers, strict=True):
        kept = 0
        for row, heads in enumerate(layer.cache.positions.tolist()):
            text = ids[row][mask[row] == 1].tolist() + [0] * 3
            kept += sum(text[position] == IMAGE for positions in heads for position in positions if position >= 0)
        assert own.num_image_seen == num_tokens
        assert own.num_image_stored == kept / 4
    assert 0 < stats.total.num_image_stored < num_tokens
    rows = []
    for row, chosen in enumerate((cache.copy(), cache.copy())):
        chosen.batch_select_indices(torch.tensor([row]))
        rows.append(chosen.stats().total.num_image_stored)
    assert sum(rows) / 2 == stats.total.num_image_stored


def test_a_stack_counts_the_images_of_its_rows() -> None:
    model = seeing_model("llava")
    caches = [RocketKVCache(model.config, config) for config in (COMPRESSED, EVERYTHING)]
    for cache in caches:
        ids, mask, image = seen_prompt("llava", 200)
        generate(model, ids, mask, new=2, **pass_cache(cache), **image)
    alone = [cache.stats().total.num_image_stored for cache in caches]
    assert alone[0] < alone[1] == 16
    assert batch_caches(caches).stats().total.num_image_stored == sum(alone) / 2


def test_a_model_without_images_counts_none() -> None:
    model = enabled_model("qwen3")
    cache = RocketKVCache(model.config, COMPRESSED)
    generate(model, *prompts(20), new=2, **pass_cache(cache))
    assert cache.stats().total.num_image_seen == cache.stats().total.num_image_stored == 0
