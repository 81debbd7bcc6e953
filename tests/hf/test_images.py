"""Tests of prompts with an image: two turns of a padded batch, and a small budget alone and in a batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rocketkv import RocketKVCache, RocketKVConfig, UnsupportedError, backends
from rocketkv.hf.versions import pass_cache
from tiny import EVERYTHING, SMALL, generate, prompts
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
