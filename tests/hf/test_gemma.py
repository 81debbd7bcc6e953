"""Tests of a second real model, a base model whose sliding-window layers stay as they are."""

from typing import Any

import pytest
import torch

from rocketkv import RocketKVCache, RocketKVConfig, disable, enable
from rocketkv.eval.data.haystack import default_text
from rocketkv.hf.models import LoadedModel
from rocketkv.hf.versions import pass_cache

NEW = 6


@pytest.fixture(autouse=True)
def _restored(gemma: LoadedModel) -> Any:
    yield
    disable(gemma.model)


def test_its_tokenizer_is_that_of_its_file(gemma: LoadedModel) -> None:
    assert gemma.tokenizer("The capital of France is").input_ids == [2, 818, 5279, 529, 7001, 563]
    assert gemma.tokenizer.chat_template is None
    assert (gemma.context_length, gemma.group_size, gemma.model.dtype) == (32768, 4, torch.float32)


@torch.inference_mode()
def test_a_budget_for_everything_gives_plain_generates_tokens(gemma: LoadedModel) -> None:
    needle = "The secret code of the cedar garden is"
    text = default_text()[20000:23600]  # longer than a sliding window
    prompt = f"{text[:1200]} {needle} 48213; keep it safe. {text[1200:]}\n\n{needle}"
    batch = gemma.tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    plain = gemma.model.generate(**batch, **options)
    enable(gemma.model)
    cache = RocketKVCache(gemma.model.config, RocketKVConfig(dense_below=0, token_budget=4096))
    ours = gemma.model.generate(**batch, **options, **pass_cache(cache))
    assert batch.input_ids.shape[1] > 512
    assert ours.tolist() == plain.tolist()
    assert "48213" in gemma.tokenizer.decode(ours[0, batch.input_ids.shape[1] :])
