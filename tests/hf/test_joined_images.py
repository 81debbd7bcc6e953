"""Tests of images whose tokens see each other in both directions (Gemma 3): exact in every turn and in stage 1."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rocketkv import InputError, RocketKVCache, RocketKVConfig, UnsupportedError, backends
from rocketkv.hf.images import read_ahead
from rocketkv.hf.padding import Padding
from rocketkv.hf.versions import CACHE_ARGUMENT, pass_cache
from tiny import COMPRESSED_MT, EVERYTHING, SMALL, generate, prompts
from vision import IMAGE, seeing_model

SIXTEEN = RocketKVConfig(dense_below=0, token_budget=16, **SMALL)
SIZE = 16  # tokens of an image
EARLY, LATE = 4, 28  # where images begin in a prompt of 44 tokens at the least; a late one ends it, in stage 1's window


def prompt(
    *lengths: int, starts: tuple[int, ...] = (EARLY,), seed: int = 0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return prompts with an image at each of `starts`, counted in the shortest one, their mask, types and pixels."""
    ids, mask = prompts(*lengths, seed=seed)
    ids = ids.clamp(max=IMAGE - 1)
    for start in starts:
        first = ids.shape[1] - min(lengths) + start
        ids[:, first : first + SIZE] = IMAGE
    pixels = torch.randn(len(lengths) * len(starts), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return ids, mask, {"pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}


def answers(model: PreTrainedModel, cache: DynamicCache, turns: list[Any]) -> list[Tensor]:
    """Return the conversation after each of several turns: ids, mask and image of each new text."""
    ids = mask = torch.zeros(turns[0][0].shape[0], 0, dtype=torch.int64)
    found = []
    for new, new_mask, image in turns:
        types = torch.cat([torch.zeros_like(ids), image.get("token_type_ids", torch.zeros_like(new))], 1)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, new_mask], 1)
        image = {**image, "token_type_ids": types} if image else {}
        ids = generate(model, ids, mask, new=5, **pass_cache(cache), **image)
        mask = torch.cat([mask, torch.ones(ids.shape[0], 5, dtype=torch.int64)], 1)
        found.append(ids)
    return found


@pytest.mark.parametrize("config", [EVERYTHING, RocketKVConfig(token_budget=4096, mode="multi_turn")])
@pytest.mark.parametrize(
    "turns",
    [
        [prompt(44)],
        [prompt(70, 44, starts=(EARLY, LATE - 4))],
        [prompt(70, 44, starts=(LATE,)), (*prompts(9, 5, seed=1), {}), (*prompts(7, 7, seed=2), {})],
    ],
    ids=["an image", "two images, padded", "an image, then texts, padded"],
)
def test_a_budget_for_everything_gives_the_tokens_of_a_full_cache(config: RocketKVConfig, turns: Any) -> None:
    model = seeing_model("gemma3")
    plain = answers(model, DynamicCache(config=model.config), turns)
    ours = answers(model, RocketKVCache(model.config, config), turns)
    assert all(torch.equal(*pair) for pair in zip(plain, ours, strict=True))


def test_a_later_turn_brings_an_image() -> None:
    model = seeing_model("gemma3")
    turns = [prompt(70, 44), prompt(44, 30, starts=(6,), seed=1), (*prompts(9, 9, seed=2), {})]
    cache = RocketKVCache(model.config, EVERYTHING)
    if CACHE_ARGUMENT == "past_key_values":  # generate of an earlier transformers keeps the last types only
        with pytest.raises(InputError, match="45 with an image are new; give the types of the whole text"):
            answers(model, cache, turns)
        return
    plain = answers(model, DynamicCache(config=model.config), turns)
    assert all(torch.equal(*pair) for pair in zip(plain, answers(model, cache, turns), strict=True))


@torch.inference_mode()
def test_logits_of_a_prompt_are_those_with_the_mask_and_not_causal_ones() -> None:
    model = seeing_model("gemma3")
    ids, mask, image = prompt(70, 44, starts=(LATE,))
    options = {"input_ids": ids, "attention_mask": mask, **image}
    plain = model(**options).logits[:, -12:]
    cache = RocketKVCache(model.config, EVERYTHING)
    torch.testing.assert_close(model(**options, **pass_cache(cache)).logits[:, -12:], plain, atol=1e-4, rtol=1e-4)
    causal = model(**{**options, "token_type_ids": torch.zeros_like(ids)}).logits[:, -12:]
    assert not torch.allclose(causal, plain, atol=0.01)
    with pytest.raises(InputError, match="has 44 columns, but the cache has seen 70 and 44 with an image are new"):
        model(**{name: x[:1, -44:] for name, x in options.items()}, **pass_cache(cache))


@pytest.mark.parametrize("starts", [(EARLY,), (LATE,)], ids=["before the window", "in the window"])
def test_a_small_budget_answers_alike_by_any_backend_alone_or_in_a_batch(
    monkeypatch: pytest.MonkeyPatch, starts: tuple[int, ...]
) -> None:
    model = seeing_model("gemma3")
    ids, mask, image = prompt(60, 44, starts=starts)

    def answer(rows: slice, length: int) -> tuple[Tensor, Tensor]:
        cache = RocketKVCache(model.config, SIXTEEN)
        own = {name: x[rows] if name == "pixel_values" else x[rows, -length:] for name, x in image.items()}
        tokens = generate(model, ids[rows, -length:], mask[rows, -length:], new=6, **pass_cache(cache), **own)
        return tokens[:, -6:], cache.compressed_layers[0].cache.positions

    batch, kept = answer(slice(0, 2), 60)
    for row, length in enumerate((60, 44)):
        alone, own = answer(slice(row, row + 1), length)
        assert torch.equal(alone, batch[row : row + 1])
        assert torch.equal(own, kept[row : row + 1, :, : own.shape[2]])
    monkeypatch.setattr(backends, "BACKENDS", ())
    assert torch.equal(answer(slice(0, 2), 60)[0], batch)


def test_beams_and_copies_go_on_from_an_image() -> None:
    model = seeing_model("gemma3")
    ids, mask, image = prompt(60, 44, starts=(LATE,))
    beams = [
        generate(model, ids, mask, new=5, num_beams=3, **pass_cache(cache), **image)
        for cache in (DynamicCache(config=model.config), RocketKVCache(model.config, EVERYTHING))
    ]
    assert torch.equal(*beams)
    cache = RocketKVCache(model.config, COMPRESSED_MT)
    first = generate(model, ids, mask, new=5, **pass_cache(cache), **image)
    copied = cache.copy()
    longer = torch.cat([mask, torch.ones(2, 5 + 9, dtype=torch.int64)], 1)
    texts = [generate(model, torch.cat([first, prompts(9, 9)[0]], 1), longer, **pass_cache(c)) for c in (cache, copied)]
    assert torch.equal(*texts)


def test_a_mask_is_read_and_one_of_another_form_is_refused() -> None:
    real = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]]).bool()  # padding in a later turn: two columns were seen
    sees = torch.ones(8, 8).tril().bool()[None] & real[:, None]
    sees[:, 4:6, 4:6] = True
    padding = Padding(torch.tensor([2]), torch.tensor([[0, 1, 2, 3, 4, 5]]), real)
    late = Padding(torch.tensor([2]), torch.tensor([[1, 2, 0, 3, 4, 5]]), real[:, [0, 1, 4, 2, 3, 5, 6, 7]])
    moved = sees[:, [0, 1, 4, 2, 3, 5, 6, 7]][:, :, [0, 1, 4, 2, 3, 5, 6, 7]]
    for mask, own in ((sees, padding), (moved, late)):
        for given in (mask, torch.where(mask, 0.0, torch.finfo(torch.float32).min)):
            ahead = read_ahead({"full_attention": given[:, None, 2:]}, own, 6)
            assert ahead is not None
            assert ahead.tolist() == [[0, 0, 1, 0, 0, 0]]
    assert read_ahead(torch.ones(1, 1, 4, 4).tril().bool(), Padding(), 4) is None
    odd = sees.clone()
    odd[:, 4, 7] = True  # beyond a token that it does not see
    with pytest.raises(UnsupportedError, match="attend to later ones beyond text that they do not see; give one image"):
        read_ahead(odd[:, None, 2:], padding, 6)
    hidden = sees.clone()
    hidden[:, 7, 0] = False
    with pytest.raises(UnsupportedError, match="beyond text"):
        read_ahead(hidden[:, None, 2:], padding, 6)
    assert read_ahead({"full_attention": None}, padding, 6) is None
    for none in (None, {"other": sees[:, None, 2:]}):
        with pytest.raises(UnsupportedError, match="made no mask for them; give text alone"):
            read_ahead(none, padding, 6)
