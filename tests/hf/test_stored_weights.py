"""Tests of weights that other libraries store: in fewer bits, and behind accelerate's hooks on a disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedModel, TorchAoConfig

import rocketkv
from rocketkv import RocketKVCache, UnsupportedError
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, EVERYTHING, generate, prompts, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load:UserWarning"),  # torchao's kernels for GPUs
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),  # bitsandbytes computes in float16
]
DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
DISK |= {"model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"}
LIBRARIES = {
    "auto": "accelerate",
    "disk": "accelerate",
    "int8 of torchao": "torchao.quantization",
    "8 bits of bitsandbytes": "bitsandbytes",
    "4 bits of bitsandbytes": "bitsandbytes",
}


def load_as(form: str, folder: Path) -> PreTrainedModel:
    """Return the tiny model with its weights in one of the forms of `LIBRARIES`."""
    library: Any = pytest.importorskip(LIBRARIES[form], exc_type=ImportError)
    tiny_model("llama", intermediate_size=128).save_pretrained(folder)
    options: dict[str, Any] = {"device_map": form}
    if form == "disk":
        options = {"device_map": DISK, "offload_folder": folder / "offloaded"}
    elif form.startswith("int8"):
        options = {"quantization_config": TorchAoConfig(library.Int8WeightOnlyConfig())}
    elif form.endswith("bitsandbytes"):
        bits = {f"load_in_{form[0]}bit": True}
        options = {"quantization_config": BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4")}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("form", LIBRARIES)
def test_a_budget_for_everything_gives_the_tokens_of_a_full_cache(form: str, tmp_path: Path) -> None:
    model = load_as(form, tmp_path)
    ids, mask = prompts(60, 31)
    plain = generate(model, ids, mask, new=6)
    rocketkv.enable(model)
    assert torch.equal(generate(model, ids, mask, new=6, **pass_cache(RocketKVCache(model.config, EVERYTHING))), plain)
    small = RocketKVCache(model.config, COMPRESSED)
    generate(model, ids, mask, new=6, **pass_cache(small))
    assert small.get_seq_length() == 65


@pytest.mark.usefixtures("uncompiled_graph")
def test_a_compiled_step_leaves_the_products_to_torchao(tmp_path: Path) -> None:
    model = rocketkv.compile(load_as("int8 of torchao", tmp_path))
    ids, mask = prompts(60, 31)
    plain = generate(model, ids, mask, new=4, **pass_cache(DynamicCache(config=model.config)))
    assert torch.equal(generate(model, ids, mask, new=4, **pass_cache(RocketKVCache(model.config, EVERYTHING))), plain)


@pytest.mark.usefixtures("uncompiled_graph")
def test_layers_on_a_disk_are_left_uncompiled(tmp_path: Path) -> None:
    model = rocketkv.compile(load_as("disk", tmp_path))
    plain = generate(model, *prompts(60), new=4, **pass_cache(DynamicCache(config=model.config)))
    with pytest.warns(UserWarning, match="cannot be compiled and goes on uncompiled"):
        ours = generate(model, *prompts(60), new=4, **pass_cache(RocketKVCache(model.config, EVERYTHING)))
    assert torch.equal(ours, plain)


def test_weights_that_are_packed_already_are_not_packed_again(tmp_path: Path) -> None:
    model = load_as("int8 of torchao", tmp_path)
    with pytest.raises(UnsupportedError, match="the weights are stored as Int8Tensor already; load the model anew"):
        rocketkv.compile(model, weight_dtype="int8")
