"""Tests of what `enable` and `RocketKVCache` refuse beyond the families' table, and of wrappers."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma3Config,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from families import tiny_config
from rocketkv import ConfigError, InputError, RocketKVCache, RocketKVConfig, UnsupportedError, enable
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, COMPRESSED_MT, EVERYTHING, generate, prompts, tiny_model

ENCODER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "None is no model of transformers; give what AutoModelForCausalLM.from_pretrained returns"),
        ("gpt2", "'gpt2' is no model of transformers"),
        (nn.Linear(2, 2), "Linear is no model of transformers"),
        (LlamaForCausalLM, "LlamaForCausalLM'> is no model of transformers"),
    ],
)
def test_what_is_no_model_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        enable(given)


def test_a_wrapper_that_hides_a_model_is_told_from_none() -> None:
    class Adapted(nn.Module):
        def get_base_model(self) -> PreTrainedModel:
            return tiny_model("llama")

    with pytest.raises(InputError, match=r"Adapted wraps a model; call enable\(model.get_base_model\(\)\)"):
        enable(Adapted())


def test_what_is_no_configuration_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"LlamaForCausalLM is a model; give its configuration, model\.config"):
        RocketKVCache(model, COMPRESSED)
    with pytest.raises(InputError, match="None is no configuration of a model of transformers"):
        RocketKVCache(None, COMPRESSED)
    with pytest.raises(ConfigError, match="256 is no RocketKVConfig"):
        RocketKVCache(model.config, 256)


def test_models_that_generate_no_text_are_refused() -> None:
    for model, reason in (
        (
            BertModel(BertConfig(**ENCODER)),
            "its attention is bidirectional unless its configuration has is_decoder=True",
        ),
        (ViTModel(ViTConfig(**ENCODER)), "it generates no text"),
    ):
        with pytest.raises(UnsupportedError, match=f"{type(model).__name__} is not supported: {reason}"):
            enable(model)
        with pytest.raises(UnsupportedError, match=reason):
            RocketKVCache(model.config, COMPRESSED)
    with pytest.raises(UnsupportedError, match=r"PaliGemmaForConditionalGeneration .* attend in both directions"):
        RocketKVCache(PaliGemmaConfig(), COMPRESSED)


def gemma3_with_images() -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config("gemma3").to_dict()
    config["text_config"] |= {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    return AutoModelForCausalLM.from_config(Gemma3Config(**config)).eval()


def test_a_multimodal_gemma_answers_padded_texts() -> None:
    model = gemma3_with_images()
    ids, mask = prompts(60, 33)
    types = torch.zeros_like(ids)
    expected = [generate(model, ids, mask), generate(model, ids, mask, token_type_ids=types)]
    enable(model)
    for options, plain in zip(({}, {"token_type_ids": types}), expected, strict=True):
        cache = RocketKVCache(model.config, EVERYTHING)
        assert torch.equal(generate(model, ids, mask, **options, **pass_cache(cache)), plain)
        with pytest.raises(InputError, match="all 60 tokens of the text were taken in already"):
            generate(model, ids, mask, **pass_cache(cache))


def test_chunks_within_the_padding_are_told_from_padding_at_the_right() -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(120, 20)
    cache = RocketKVCache(model.config, COMPRESSED_MT)
    with pytest.raises(UnsupportedError, match="leaves a row without a token among the 50 new columns"):
        generate(model, ids, mask, prefill_chunk_size=50, **pass_cache(cache))
    generate(model, ids, mask, prefill_chunk_size=110, **pass_cache(cache))


def test_right_padding_is_still_told() -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(50, 40)
    cache = RocketKVCache(model.config, RocketKVConfig(token_budget=64))
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="the prompts are padded at the right"):
        model(input_ids=ids, attention_mask=mask.flip(1), **pass_cache(cache))
