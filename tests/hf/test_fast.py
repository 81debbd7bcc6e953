"""Tests of the compiled decode step: same logits, one graph for all caches, eager where it does not fit."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel

import rocketkv
from rocketkv import RocketKVCache, RocketKVConfig, UnsupportedError, disable, enable
from rocketkv.hf import compiled
from rocketkv.hf.versions import pass_cache
from tiny import prompts, tiny_model

SMALL = RocketKVConfig(dense_below=0, token_budget=40, window_size=8, kernel_size=5)
SMALL_MT = RocketKVConfig(dense_below=0, token_budget=40, window_size=8, kernel_size=5, mode="multi_turn")


@pytest.fixture(autouse=True)
def _count_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@torch.inference_mode()
def decode(model: PreTrainedModel, cache: Any, steps: int, *lengths: int, seed: int = 0) -> Tensor:
    """Return the logits `[steps, B, V]` of a prefill and greedy steps, with generate's own arguments."""
    ids, mask = prompts(*lengths, seed=seed)
    first, all_logits = cache.get_seq_length(), []
    mask = torch.cat([mask.new_ones(len(lengths), first), mask], 1)
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **pass_cache(cache)).logits[:, -1]
        all_logits.append(logits)
        ids = logits.argmax(1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(lengths), 1)], 1)
    return torch.stack(all_logits)


def test_compiled_logits_are_the_same_from_one_graph_for_all_caches() -> None:
    check_three_caches("llama")


@pytest.mark.usefixtures("uncompiled_graph")
@pytest.mark.parametrize("name", ["gpt_neox", "olmo2", "phi3_long_window", "qwen3"])
def test_architectures_give_one_graph_for_all_caches(name: str) -> None:
    check_three_caches(name)


def check_three_caches(name: str) -> None:
    model = enable(tiny_model(name))
    turns = [(SMALL, (100,), 0), (SMALL, (30,), 1), (SMALL_MT, (70,), 2)]
    expected = [decode(model, RocketKVCache(model.config, c), 40, *n, seed=s) for c, n, s in turns]
    rocketkv.compile(model)
    for (config, lengths, seed), eager in zip(turns, expected, strict=True):
        cache = RocketKVCache(model.config, config)
        torch.testing.assert_close(decode(model, cache, 40, *lengths, seed=seed), eager, rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == lengths[0] + 39
    assert num_graphs() == 1
    assert not counters["graph_break"]


@pytest.mark.usefixtures("uncompiled_graph")
def test_padded_batches_of_any_size_take_two_graphs() -> None:
    model = enable(tiny_model("llama"))
    batches = [(50, 17), (60, 8, 33), (40, 41, 9, 20)]
    expected = [decode(model, RocketKVCache(model.config, SMALL), 40, *lengths) for lengths in batches]
    rocketkv.compile(model)
    for lengths, eager in zip(batches, expected, strict=True):
        torch.testing.assert_close(
            decode(model, RocketKVCache(model.config, SMALL), 40, *lengths), eager, rtol=1e-4, atol=1e-4
        )
    assert num_graphs() == 2


@pytest.mark.usefixtures("uncompiled_graph")
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without bias and with
def test_every_linear_layer_is_our_operation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    seen: list[torch.fx.Node] = []
    original = compiled._compile_graph

    def spy(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        result = original(graph, inputs)
        seen.extend(graph.graph.nodes)
        return result

    monkeypatch.setattr(compiled, "_compile_graph", spy)
    decode(rocketkv.compile(model), RocketKVCache(model.config, SMALL), 2, 30)
    targets = [node.target for node in seen]
    assert targets.count(torch.ops.rocketkv.linear.default) == 3 * 7 + 1
    assert targets.count(torch.ops.rocketkv.attend_layer) + targets.count(torch.ops.rocketkv.attend_layer.default) == 3
    assert torch._C._nn.linear not in targets


def generate(model: PreTrainedModel, cache: DynamicCache, new: int = 12, **options: Any) -> Any:
    ids, mask = prompts(50, 31)
    return model.generate(
        ids, attention_mask=mask, **pass_cache(cache), max_new_tokens=new, eos_token_id=None, **options
    )


@pytest.mark.usefixtures("uncompiled_graph")
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"output_logits": True, "return_dict_in_generate": True}])
def test_generate_takes_the_graph_by_itself(options: dict[str, Any]) -> None:
    options = {"do_sample": False, **options}
    model = enable(tiny_model("llama"))
    expected = generate(model, RocketKVCache(model.config, SMALL), **options)
    rocketkv.compile(model)
    output = generate(model, RocketKVCache(model.config, SMALL), **options)
    assert num_graphs() == 1
    if options.get("return_dict_in_generate"):
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
        output, expected = output.sequences, expected.sequences
    assert torch.equal(output, expected)


def test_what_does_not_fit_runs_uncompiled() -> None:
    model = rocketkv.compile(tiny_model("llama"))
    with torch.inference_mode():
        cache, ids = RocketKVCache(model.config, SMALL), prompts(30)[0]
        model(ids, **pass_cache(cache))
        token = ids[:, :1]
        assert len(model(token, **pass_cache(cache), output_hidden_states=True).hidden_states) == 4
        assert isinstance(model(input_ids=token, **pass_cache(cache), return_dict=False), tuple)
        assert model(input_ids=token, **pass_cache(cache), labels=token).loss is not None
        model(inputs_embeds=model.get_input_embeddings()(token), **pass_cache(cache))
        model(input_ids=token, **pass_cache(RocketKVCache(model.config, SMALL)))  # a prompt of one token
        with pytest.raises(UnsupportedError, match="output_attentions"):
            model(input_ids=token, **pass_cache(cache), output_attentions=True)
        seen: list[str] = []
        handle = model.register_forward_hook(lambda *_: seen.append("called"))
        model(input_ids=token, **pass_cache(cache))
        handle.remove()
        assert seen == ["called"]
    generate(model, DynamicCache(config=model.config))
    windowed = rocketkv.compile(tiny_model("gemma3"))
    generate(windowed, RocketKVCache(windowed.config, SMALL))
    cache = RocketKVCache(model.config, SMALL)
    with torch.no_grad():
        model(prompts(30)[0], **pass_cache(cache))
    with pytest.raises(UnsupportedError, match="gradients"):
        model(input_ids=prompts(1)[0], **pass_cache(cache))
    assert num_graphs() == 0


@pytest.mark.usefixtures("uncompiled_graph")
def test_positions_need_not_be_given() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(30)
    outputs = []
    with torch.inference_mode():
        for _ in range(2):
            cache = RocketKVCache(model.config, SMALL)
            model(ids, **pass_cache(cache))
            outputs.append(model(input_ids=ids[:, :1], **pass_cache(cache)).logits)
            rocketkv.compile(model)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert num_graphs() == 1


def test_a_model_that_cannot_be_compiled_says_so_and_goes_on() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}  # its rotation depends on the positions' values
    model = enable(tiny_model("llama", rope_parameters=rope))
    expected = decode(model, RocketKVCache(model.config, SMALL), 3, 30)
    rocketkv.compile(model)
    with pytest.warns(UserWarning, match="LlamaForCausalLM cannot be compiled and goes on uncompiled"):
        output = decode(model, RocketKVCache(model.config, SMALL), 3, 30)
    assert torch.equal(output, expected)


@pytest.mark.usefixtures("uncompiled_graph")
def test_models_of_one_shape_share_a_graph_but_no_weights() -> None:
    models = [enable(tiny_model("llama")) for _ in range(3)]
    models[1].model.layers[0].mlp.up_proj.weight.data *= 2
    expected = [decode(model, RocketKVCache(model.config, SMALL), 9, 20) for model in models]
    assert not torch.equal(expected[0], expected[1])
    for model, eager in zip(models, expected, strict=True):
        torch.testing.assert_close(
            decode(rocketkv.compile(model), RocketKVCache(model.config, SMALL), 9, 20), eager, rtol=1e-4, atol=1e-4
        )
    is_shared = Version(torch.__version__) >= Version("2.13")  # torch 2.9 compiles each of them
    assert num_graphs() == (1 if is_shared else 3)


def test_it_is_undone() -> None:
    model = tiny_model("llama")
    assert rocketkv.compile(rocketkv.compile(model)) is model
    copied = deepcopy(model)
    for undo in (rocketkv.uncompile, disable):
        rocketkv.compile(model)
        undo(undo(model))
        assert model._compiled_call_impl is None
    assert copied._compiled_call_impl is None
    enable(model)
    decode(model, RocketKVCache(model.config, SMALL), 2, 20)
    assert num_graphs() == 0
    model.compile()
    with pytest.raises(UnsupportedError, match=r"model\.compile"):
        rocketkv.compile(model)
