"""Tests of weights in 8 and 4 bits: they are within half a step, and products are as exact as in bfloat16."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

import rocketkv
from rocketkv import InputError, RocketKVCache, RocketKVConfig, UnsupportedError, disable, enable
from rocketkv.bench.model import sizes_of
from rocketkv.hf.versions import pass_cache
from rocketkv.hf.weights import FORMATS, QuantizedLinear, quantize, quantized_as
from tiny import prompts, tiny_model

SIZES = [(64, 32), (192, 576), (4160, 96)]  # the last is packed in two parts
FITTING = {"head_dim": 32, "intermediate_size": 128}
every_format = pytest.mark.parametrize("weights", FORMATS)


def fitting_model(name: str = "llama", **changes: int) -> PreTrainedModel:
    return tiny_model(name, **{**FITTING, **changes}).bfloat16()


def random_layer(num_out: int, num_in: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(num_in, num_out, bias=bias).bfloat16()
    layer.weight.data[0] = 0
    layer.weight.data[1] = -3.7
    layer.weight.data[2, ::7] *= 1000
    return layer


def unpacked(layer: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the layer's weights, dequantized; in float32 they are not rounded."""
    return FORMATS[layer.weight_dtype].unpack(layer.packed, layer.scales.to(dtype))


def dequantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return an enabled copy in this dtype with plain linear layers of the same weights."""
    model = deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data, plain.bias = unpacked(layer, dtype), layer.bias
            model.set_submodule(name, plain)
    return enable(model.to(dtype))


def run(model: PreTrainedModel) -> Tensor:
    """Return logits `[9, B, V]` float32 of a prompt's last token and of eight given tokens after it."""
    cache = RocketKVCache(model.config, RocketKVConfig(token_budget=64))
    ids, _ = prompts(39, 39)
    with torch.inference_mode():
        logits = [
            model(input_ids=part, **pass_cache(cache)).logits[:, -1] for part in (ids[:, :31], *ids[:, 31:].split(1, 1))
        ]
    return torch.stack(logits).float()


def check_within(output: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Check that the output's error is at most twice that of plain torch in the same dtype."""
    assert (output - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm()


@every_format
@pytest.mark.parametrize(("num_out", "num_in"), SIZES)
def test_weights_stay_within_half_a_step(weights: str, num_out: int, num_in: int) -> None:
    layer = random_layer(num_out, num_in)
    restored = unpacked(QuantizedLinear(layer, weights), torch.float32)
    assert restored.shape == layer.weight.shape
    groups = layer.weight.detach().float().view(num_out, -1, num_in if weights == "int8" else 32)
    largest = groups.abs().amax(2, keepdim=True)
    if weights == "int8":
        bound = largest / 127 / 2
    else:  # the zero is rounded too, to eight bits
        bound = (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15 / 2 + largest / 2**9
    assert ((restored.view_as(groups) - groups).abs() <= 1.1 * bound).all()  # so is the scale
    assert not restored[0].any()


@every_format
@pytest.mark.parametrize(("num_out", "num_in"), SIZES)
@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 256, 257])
def test_products_are_those_of_the_unpacked_weights(weights: str, num_out: int, num_in: int, num_rows: int) -> None:
    check_products(weights, num_out, num_in, num_rows)


def check_products(weights: str, num_out: int, num_in: int, num_rows: int) -> None:
    layer = QuantizedLinear(random_layer(num_out, num_in, bias=True), weights)
    x = torch.randn(num_in, num_rows).bfloat16().t()[None]  # not contiguous
    output = layer(x)
    assert output.shape == (1, num_rows, num_out)
    assert output.dtype == torch.bfloat16
    plain = nn.functional.linear(x, unpacked(layer)) + layer.bias
    exact = nn.functional.linear(x.float(), unpacked(layer, torch.float32), layer.bias.float())
    check_within(output.float(), plain.float(), exact)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="AVX2 is what the other tests ran")
def test_int4_is_right_in_the_order_of_avx2() -> None:
    code = "import test_weights as t; t.check_products('int4', 192, 96, 3); t.check_products('int4', 192, 96, 300)"
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "avx2",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_fast_model_computes_what_one_with_the_unpacked_weights_does() -> None:
    check_fast("llama", "int4")


@pytest.mark.parametrize(("name", "weights"), [("llama", "int8"), ("qwen2", "int4"), ("qwen2", "int8")])  # with a bias
def test_its_graph_does_too_operation_by_operation(name: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)
    check_fast(name, weights)


def check_fast(name: str, weights: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = quantize(fitting_model(name), weights)
    plain, exact = dequantized(model, torch.bfloat16), dequantized(model, torch.float32)
    check_within(run(rocketkv.compile(model)), run(plain), run(exact))
    assert counters["stats"]["unique_graphs"] == 1


@every_format
@pytest.mark.parametrize("is_tied", [True, False])
def test_only_the_embedding_and_norms_are_held_in_bfloat16(weights: str, is_tied: bool) -> None:
    model = fitting_model(tie_word_embeddings=is_tied)
    before = model.get_input_embeddings().weight.clone()
    head_before = model.get_output_embeddings().weight.clone()
    ids, _ = prompts(5)
    expected = model(ids).logits
    rocketkv.compile(model, weight_dtype=weights)
    assert quantized_as(model) == weights
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert not [name for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name]
    assert (unpacked(model.get_output_embeddings()) - head_before).abs().max() < 0.1
    assert model(ids).logits.argmax(-1).eq(expected.argmax(-1)).float().mean() >= 0.6


@every_format
def test_a_step_reads_fewer_bytes(weights: str) -> None:
    model = fitting_model()
    plain = sizes_of(model).weight_bytes
    linear = 2 * sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    others = plain - linear
    read = sizes_of(quantize(model, weights)).weight_bytes - others
    assert linear * (0.5 if weights == "int8" else 5 / 16) <= read < linear * (0.54 if weights == "int8" else 0.32)


def test_it_is_done_once() -> None:
    model = rocketkv.compile(fitting_model(), weight_dtype="int8")
    held = model.model.layers[0].mlp.up_proj
    assert rocketkv.compile(model, weight_dtype="int8").model.layers[0].mlp.up_proj is held
    with pytest.raises(UnsupportedError, match="the weights are in int8 already; load the model anew"):
        quantize(model, "int4")
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM were given up for int8; load it anew"):
        rocketkv.uncompile(model)
    assert disable(model)._compiled_call_impl is None
    assert quantized_as(model) == "int8"


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        (fitting_model, "int3", "weight_dtype='int3' does not exist; choose from int8, int4"),
        (lambda: fitting_model().float(), "int8", "q_proj is in float32; load the model in bfloat16"),
        (lambda: fitting_model().half(), "int4", "q_proj is in float16; load the model in bfloat16"),
        (lambda: fitting_model(intermediate_size=48), "int4", "mlp.gate_proj maps 64 to 48 features; multiples of 32"),
        (lambda: fitting_model().to("meta"), "int8", "q_proj is on meta; it works on the CPU"),
    ],
)
def test_what_does_not_fit_is_refused_and_left_as_it_was(model: object, weights: str, message: str) -> None:
    refused = model()
    with pytest.raises((InputError, UnsupportedError), match=message):
        quantize(refused, weights)
    assert quantized_as(refused) is None


def test_int4_needs_a_cpu_whose_packing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(UnsupportedError, match="would run DEFAULT code; int4 needs AVX2 or AVX-512, int8 does not"):
        quantize(fitting_model(), "int4")
    quantize(fitting_model(), "int8")
