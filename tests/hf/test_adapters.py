"""Tests of LoRA adapters on an enabled model: put on before or after `enable`, merged or not."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rocketkv import RocketKVCache, enable
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, EVERYTHING, prompts, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft


OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def adapted(model: PreTrainedModel) -> Any:
    """Return a model with an adapter that changes its answers, the same at every call."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("is_merged", [False, True], ids=["beside", "merged"])
@pytest.mark.parametrize("is_enabled_first", [False, True], ids=["adapted first", "enabled first"])
@torch.inference_mode()
def test_an_adapter_answers_with_a_compressed_cache(is_enabled_first: bool, is_merged: bool) -> None:
    ids, mask = prompts(60, 31)
    inputs = {"input_ids": ids, "attention_mask": mask, **OPTIONS}
    plain = adapted(tiny_model("llama")).generate(**inputs)
    assert not torch.equal(plain, tiny_model("llama").generate(**inputs))
    if is_enabled_first:
        model = adapted(enable(tiny_model("llama")))
    else:
        model = adapted(tiny_model("llama"))
        enable(model.get_base_model())
    if is_merged:
        model = model.merge_and_unload()
    ours = model.generate(**inputs, **pass_cache(RocketKVCache(model.config, EVERYTHING)))
    assert torch.equal(ours, plain)
    small = RocketKVCache(model.config, COMPRESSED)
    model.generate(**inputs, **pass_cache(small))
    assert small.get_seq_length() == 67
