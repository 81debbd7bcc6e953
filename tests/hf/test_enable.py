"""Tests of what `enable` and the import leave unchanged."""

import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from conversations import answered, architectures
from rocketkv import RocketKVCache, UnsupportedError, disable, enable
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, EVERYTHING, generate, prompts, tiny_model


@architectures
def test_an_enabled_model_is_its_old_self_without_our_cache(name: str) -> None:
    model = tiny_model(name)
    ids, mask = prompts(60, 31)
    plain = generate(model, ids, mask)
    implementation = model.config._attn_implementation
    enable(model)
    assert torch.equal(generate(model, ids, mask), plain)
    assert torch.equal(generate(model, ids, mask, **pass_cache(DynamicCache(config=model.config))), plain)
    assert torch.equal(generate(model, ids, mask, use_cache=False), plain)
    disable(model)
    assert model.config._attn_implementation == implementation
    assert not model.get_decoder()._forward_pre_hooks
    assert not model.get_decoder()._forward_hooks
    assert torch.equal(generate(model, ids, mask), plain)
    disable(model)  # once more does no harm
    assert enable(enable(model)) is model


def test_importing_changes_nothing() -> None:
    code = (
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "from transformers.models.llama import modeling_llama\n"
        "def state(): return dict(AttentionInterface()), dict(AttentionMaskInterface()), dict(vars(modeling_llama))\n"
        "before = state()\n"
        "import rocketkv.hf.switch\n"
        "assert state() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_shared_config_that_was_disabled_elsewhere_is_noticed() -> None:
    model = enable(tiny_model("llama"))
    model.set_attn_implementation("sdpa")
    ids, _ = prompts(50)
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="its attn_implementation is now 'sdpa'"):
        model(input_ids=ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)))


def test_a_model_that_is_enabled_generates_batches_as_before() -> None:
    model = tiny_model("llama")
    inputs = [prompts(20)[0][0].tolist(), prompts(31, seed=1)[0][0].tolist()]
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    options = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)

    def batch() -> list[list[int]]:
        outputs = model.generate_batch(
            inputs=inputs, generation_config=options, continuous_batching_config=small, warmup=False
        )
        return [outputs[key].generated_tokens for key in sorted(outputs)]

    plain = batch()
    enable(model)
    assert batch() == plain
    answered(model, COMPRESSED, prompts(50)[0])
    disable(model)
    assert not {"generate", "init_continuous_batching"} & set(vars(model))
    assert batch() == plain


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_any_attention_implementation_may_be_enabled(implementation: str) -> None:
    model = tiny_model("gemma3")
    ids, mask = prompts(60, 31)
    plain = generate(model, ids, mask)
    model.set_attn_implementation(implementation)
    enable(model)
    assert torch.equal(generate(model, ids, mask, **pass_cache(RocketKVCache(model.config, EVERYTHING))), plain)
    disable(model)
    assert model.config._attn_implementation == implementation
