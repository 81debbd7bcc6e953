"""Tests that models, masks and calls that do not fit are refused by name."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    MistralConfig,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from rocketkv import InputError, RocketKVCache, RocketKVConfig, UnsupportedError, enable
from rocketkv.eviction import KeepAll
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, CONFIGS, GROUPED, generate, prompts, tiny_model


def refused(model: PreTrainedModel) -> str:
    with pytest.raises(UnsupportedError) as error:
        enable(model)
    return str(error.value)


def test_architectures_that_do_not_fit_are_refused_by_name() -> None:
    small = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    mla = DeepseekV3Config(
        **small,
        num_key_value_heads=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    assert "DeepseekV3ForCausalLM is not supported: multi-head latent attention" in refused(
        AutoModelForCausalLM.from_config(mla)
    )
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64))
    assert "T5ForConditionalGeneration is not supported: it is an encoder-decoder" in refused(t5)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64))
    assert refused(bloom).startswith("BloomForCausalLM is not supported:")
    assert refused(bloom).endswith("; use it with transformers' own DynamicCache.")
    sliding = AutoModelForCausalLM.from_config(MistralConfig(**GROUPED, sliding_window=16))
    assert "no layer of it attends to the whole text, so there is nothing to compress" in refused(sliding)


def test_assisted_decoding_is_refused() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(50)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model("llama")}):
        with pytest.raises(UnsupportedError, match="cannot be rolled back, so assisted decoding does not work"):
            generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)), **options)


def test_static_caches_are_refused() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(50)
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)), cache_implementation="static")
    assert not RocketKVCache(model.config, COMPRESSED).is_compileable
    # a static cache of transformers' own goes on working, as on any model
    plain = generate(model, ids)
    assert torch.equal(generate(model, ids, **pass_cache(StaticCache(config=model.config, max_cache_len=80))), plain)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda mask: mask.flip(1), UnsupportedError, "the prompts are padded at the right"),
        (
            lambda mask: mask[:, 1:],
            InputError,
            "attention_mask has 49 columns, but the cache has seen 0 and 50 are new",
        ),
        (lambda mask: mask[:, None, None], UnsupportedError, "give a two-dimensional attention_mask"),
    ],
)
def test_masks_other_than_left_padding_are_refused(change: Any, error: type[Exception], message: str) -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(50, 40)
    with torch.inference_mode(), pytest.raises(error, match=message):
        model(input_ids=ids, attention_mask=change(mask), **pass_cache(RocketKVCache(model.config, COMPRESSED)))


def test_a_mask_that_hides_what_was_taken_in_is_refused() -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(50)
    cache = RocketKVCache(model.config, COMPRESSED)
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask, **pass_cache(cache))
        changed = torch.ones(1, 51, dtype=torch.int64)
        changed[0, 3] = 0
        with pytest.raises(UnsupportedError, match="hides or reveals tokens that the cache has already taken in"):
            model(input_ids=ids[:, :1], attention_mask=changed, **pass_cache(cache))


def test_a_mask_that_moves_the_padding_is_refused() -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(50, 30)
    cache = RocketKVCache(model.config, COMPRESSED)
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask, **pass_cache(cache))
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        moved = torch.cat([mask.flip(1), longer[:, -1:]], 1)  # as many zeros as before, in other columns
        with pytest.raises(UnsupportedError, match="hides or reveals tokens"):
            model(input_ids=ids[:, :1], attention_mask=moved, **pass_cache(cache))
        model(input_ids=ids[:, :1], attention_mask=longer, **pass_cache(cache))
        cache.reorder_cache(torch.tensor([1, 0]))  # the mask goes with its rows
        longer = torch.cat([longer.flip(0), longer[:, -1:]], 1)
        model(input_ids=ids[:, :1], attention_mask=longer, **pass_cache(cache))


def test_other_misuse_is_refused() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(50)
    with torch.inference_mode():
        with pytest.raises(UnsupportedError, match="no attention weights"):
            model(input_ids=ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)), output_attentions=True)
        deeper = copy.deepcopy(model.config)
        deeper.num_hidden_layers = 5
        deeper.layer_types = None
        with pytest.raises(InputError, match="the cache has 5 layers, the model 3"):
            model(input_ids=ids, **pass_cache(RocketKVCache(deeper, COMPRESSED)))
        with pytest.raises(InputError, match="by keyword"):
            model.get_decoder()(ids, None, None, RocketKVCache(model.config, COMPRESSED))
        with pytest.raises(InputError, match="attention_mask too"):
            model.get_decoder()(ids, torch.ones_like(ids), **pass_cache(RocketKVCache(model.config, COMPRESSED)))
        with pytest.raises(UnsupportedError, match="shares its configuration with a model that is enabled already"):
            enable(AutoModelForCausalLM.from_config(model.config))
        with pytest.raises(UnsupportedError, match="rolled back"):
            RocketKVCache(model.config, COMPRESSED).crop(-1)
    with pytest.raises(UnsupportedError, match="has no gradients"):
        model(input_ids=ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)))


@pytest.mark.parametrize("layer", [1, 2])
def test_a_cache_whose_pass_broke_off_says_so(layer: int) -> None:
    class Breaks(KeepAll):
        calls = 0

        def keep(self, *_: Any, **__: Any) -> Tensor | None:
            self.calls += 1
            if self.calls == layer + 1:
                raise RuntimeError("no luck")
            return None

    model = enable(tiny_model("llama"))
    ids, _ = prompts(150)
    cache = RocketKVCache(model.config, RocketKVConfig(dense_below=0, token_budget=12, eviction=Breaks()))
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="no luck"):
            model(input_ids=ids, **pass_cache(cache))
        with pytest.raises(InputError, match=rf"in layer {layer}, .* broke off half way; call cache.reset\(\)"):
            model(input_ids=ids, **pass_cache(cache))
        cache.reset()


def test_bidirectional_attention_is_refused() -> None:
    config = CONFIGS["gemma3"].to_dict() | {"use_bidirectional_attention": True}
    model = AutoModelForCausalLM.from_config(type(CONFIGS["gemma3"])(**config)).eval()
    ids, _ = prompts(50)
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="its attention is bidirectional"):
        enable(model)(input_ids=ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)))
