"""Captured decode steps give the tokens of eager decoding with few captures; here a tape takes a graph's place."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import rocketkv
from rocketkv import RocketKVCache, RocketKVConfig, enable, ragged
from rocketkv.backends import cpp
from rocketkv.decode import Decoder
from rocketkv.hf import graph, recording
from rocketkv.hf.versions import pass_cache
from tape import Recorder
from tiny import generate, prompts, tiny_model

if (reason := cpp.decline(rocketkv.backends.Spec("cpu", torch.float32, 16))) is not None:
    pytest.skip(f"{reason}; only the steps of a backend are captured", allow_module_level=True)

OPTIONS: dict[str, Any] = {"token_budget": 40, "window_size": 8, "kernel_size": 5, "dense_below": 0}
CONFIGS = {
    "single_turn": RocketKVConfig(**OPTIONS),
    "multi_turn": RocketKVConfig(mode="multi_turn", **OPTIONS),
    "host": RocketKVConfig(mode="multi_turn", archive_on_host=True, **OPTIONS),
    "int8": RocketKVConfig(kv_dtype="int8", **OPTIONS),
    "pages": RocketKVConfig(selection="hybrid", **OPTIONS),
    "dense": RocketKVConfig(eviction="keep_all", selection="dense", token_budget=40),
}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Let steps on the CPU be recorded on tapes, around the uncompiled model."""
    recorder, original = Recorder(), Decoder.bind
    monkeypatch.setattr(torch, "compile", recorder.compile)
    monkeypatch.setattr(Decoder, "bind", lambda *args: recorder.bind(original, *args))
    monkeypatch.setitem(recording.RECORDERS, "cpu", recorder)
    return recorder


def both(config: RocketKVConfig, run: Any) -> tuple[Any, Any]:
    """Run a function of a model and a cache, eagerly and with graphs."""
    found = []
    for prepare in (enable, rocketkv.compile):
        model = prepare(tiny_model("llama"))
        found.append(run(model, RocketKVCache(model.config, config)))
    return found[0], found[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows_and_several_turns_give_the_tokens_of_eager_decoding(name: str, recorder: Recorder) -> None:
    def run(model: PreTrainedModel, cache: RocketKVCache) -> tuple[Tensor, list[int], int]:
        ids, mask = prompts(150, 131)
        ids = generate(model, ids, mask, 45, **pass_cache(cache))
        question = prompts(9, 9, seed=1)[0]
        ids = torch.cat([ids, question], 1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.int64)], 1)
        ids = generate(model, ids, mask, 20, **pass_cache(cache))
        layer = cache.compressed_layers[0].cache
        return ids, [layer.num_seen, layer.num_decoded, *layer.row_seen], cache.stats().total.kv_bytes

    eager, captured = both(CONFIGS[name], run)
    assert torch.equal(eager[0], captured[0])
    assert eager[1:] == captured[1:]
    steps = 44 + 19
    assert recorder.replays + 2 * len(recorder.tapes) <= steps
    assert recorder.replays > steps - 3 * len(recorder.tapes) - 2


def test_a_graph_lasts_until_a_buffer_grows(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "GROWTH", 100)
    config = RocketKVConfig(eviction="keep_all", selection="dense", token_budget=1000)  # so that the plan stays
    model = rocketkv.compile(tiny_model("llama"))
    cache = RocketKVCache(model.config, config)
    generate(model, prompts(30)[0], new=1 + 100 + 101, **pass_cache(cache))
    assert len(recorder.tapes) == 2
    assert recorder.replays == 98 + 99  # in each buffer one step is eager, one is captured, and the others replay


def test_on_a_gpu_all_buffers_grow_together_by_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged.RaggedTokens, "growth", ragged.GROWTH_ON_GPU)
    model = enable(tiny_model("llama"))
    cache = RocketKVCache(model.config, CONFIGS["multi_turn"])
    generate(model, prompts(150)[0], new=2, **pass_cache(cache))
    working = cache.compressed_layers[0].cache.working
    assert working.room >= 255


def test_beams_and_draws_give_the_tokens_of_eager_decoding(recorder: Recorder) -> None:
    def run(model: PreTrainedModel, cache: RocketKVCache, **options: Any) -> Tensor:
        torch.manual_seed(0)
        ids, mask = prompts(50, 31)
        return generate(model, ids, mask, 12, **pass_cache(cache), **options)

    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0}):
        eager, captured = both(CONFIGS["single_turn"], partial(run, **options))
        assert torch.equal(eager, captured)
    assert recorder.replays == 11 - 2 * len(recorder.tapes)  # beams change their rows at each step: no tape is theirs


@torch.inference_mode()
def test_logits_stay_and_a_cache_that_went_back_is_captured_anew(recorder: Recorder) -> None:
    def run(model: PreTrainedModel, cache: RocketKVCache) -> Tensor:
        ids = prompts(60)[0]
        model(ids, **pass_cache(cache))
        logits = [model(input_ids=ids[:, i : i + 1], **pass_cache(cache)).logits for i in range(6)]
        text = torch.cat([ids, ids[:, :6]], 1)
        for _ in range(2):
            cache.rewind_to(text[:, :64])
            logits += [model(input_ids=ids[:, i : i + 1], **pass_cache(cache)).logits for i in range(3, 8)]
        other = cache.copy()
        for each in (cache, other, cache):
            logits.append(model(input_ids=ids[:, 9:10], **pass_cache(each)).logits)
        return torch.stack(logits)

    eager, captured = both(CONFIGS["multi_turn"], run)
    torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-5)
    assert len(recorder.tapes) == 3


@torch.inference_mode()
def test_weights_that_move_and_tracing_are_noticed(recorder: Recorder) -> None:
    def run(model: PreTrainedModel, cache: RocketKVCache) -> Tensor:
        ids = prompts(60)[0]
        model(ids, **pass_cache(cache))
        logits = []
        for step in range(9):
            if step == 4:
                head = model.get_output_embeddings()
                head.weight.data = head.weight.data * 2
            if step == 7:
                cache.compressed_layers[1].cache.trace = True
            logits.append(model(input_ids=ids[:, step : step + 1], **pass_cache(cache)).logits)
        assert cache.compressed_layers[1].cache.last_attended is not None
        return torch.stack(logits)

    eager, captured = both(CONFIGS["single_turn"], run)
    torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-5)
    assert (len(recorder.tapes), recorder.replays) == (2, 2 + 1)


@torch.inference_mode()
@pytest.mark.parametrize("is_replay", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_breaks_off_leaves_the_cache_as_it_was(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], is_replay: bool
) -> None:
    model = rocketkv.compile(tiny_model("llama"))
    ids = prompts(60)[0]
    cache = RocketKVCache(model.config, CONFIGS["single_turn"])
    model(ids, **pass_cache(cache))
    for step in range(3 if is_replay else 1):
        model(input_ids=ids[:, step : step + 1], **pass_cache(cache))
    twin, calls = deepcopy(cache), 0
    name = "count_step" if is_replay else "RECORDERS"
    original = getattr(graph, name)

    def broken(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (2 if is_replay else 1):
            raise error("broken")
        return original(*args)

    monkeypatch.setattr(graph, name, broken if is_replay else {"cpu": broken})
    if error is RuntimeError and not is_replay:
        with pytest.warns(UserWarning, match=r"of LlamaForCausalLM cannot be captured in a graph .* \(broken\)"):
            output = model(input_ids=ids[:, 9:10], **pass_cache(cache)).logits
    else:
        with pytest.raises(error):
            model(input_ids=ids[:, 9:10], **pass_cache(cache))
        assert cache.get_seq_length() == twin.get_seq_length()
        output = model(input_ids=ids[:, 9:10], **pass_cache(cache)).logits
    expected = rocketkv.uncompile(model)(input_ids=ids[:, 9:10], **pass_cache(twin)).logits
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_nothing_is_captured_that_has_not_run_as_it_is(recorder: Recorder) -> None:
    ids = prompts(60)[0]
    model = enable(tiny_model("llama"))
    cache = RocketKVCache(model.config, CONFIGS["single_turn"])

    def step(count: int, **options: Any) -> None:
        for i in range(count):
            model(input_ids=ids[:, i : i + 1], **pass_cache(cache), **options)

    model(ids, **pass_cache(cache))
    step(3)
    rocketkv.compile(model)
    step(1, output_hidden_states=True)  # runs uncompiled
    assert recorder.log == []
    step(2)
    assert recorder.log == ["step", "capture", "step", "captured"]
    for layer in cache.compressed_layers:  # each binds another step
        assert layer.cache.working is not None
        tokens = [torch.randn(1, heads, 1, layer.cache.working.head_dim) for heads in (4, 2, 2)]
        layer.cache.decode(*tokens, scale=0.5)
    recorder.log.clear()
    step(3)
    assert recorder.log == ["step", "capture", "step", "captured"]


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_step_may_be_captured_and_replayed_in_another_mode(recorder: Recorder, first: Any) -> None:
    second = torch.no_grad if first is torch.inference_mode else torch.inference_mode

    def run(model: PreTrainedModel, cache: RocketKVCache) -> Tensor:
        ids, logits = prompts(60)[0], []
        with first():
            model(ids, **pass_cache(cache))
        for i, mode in enumerate((first, second, second, first, first, second)):
            with mode():
                logits.append(model(input_ids=ids[:, i : i + 1], **pass_cache(cache)).logits.clone())
        with torch.inference_mode():
            return torch.stack(logits)

    eager, captured = both(CONFIGS["single_turn"], run)
    with torch.inference_mode():
        torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-5)
    assert (len(recorder.tapes), recorder.replays) == (1, 3)  # what ran in one mode is not captured in the other


@torch.inference_mode()
def test_too_little_memory_for_a_capture_is_raised_and_refuses_no_later_one(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rocketkv.compile(tiny_model("llama"))
    ids = prompts(60)[0]
    cache = RocketKVCache(model.config, CONFIGS["single_turn"])
    model(ids, **pass_cache(cache))

    def broken(work: Any, device: torch.device) -> Any:
        try:
            raise torch.OutOfMemoryError("no memory")
        finally:
            raise RuntimeError("a previous error during capture")  # as the end of a capture does

    with monkeypatch.context() as patch:
        patch.setitem(recording.RECORDERS, "cpu", broken)
        model(input_ids=ids[:, :1], **pass_cache(cache))
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            model(input_ids=ids[:, 1:2], **pass_cache(cache))
    for step in range(1, 4):
        model(input_ids=ids[:, step : step + 1], **pass_cache(cache))
    assert (len(recorder.tapes), recorder.replays) == (1, 1)


def test_a_step_that_waits_for_the_device_goes_on_without_a_graph(recorder: Recorder) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}  # its rotation depends on the positions' values
    found = []
    for prepare in (enable, rocketkv.compile):
        model = prepare(tiny_model("llama", rope_parameters=rope))
        cache = RocketKVCache(model.config, CONFIGS["single_turn"])
        if prepare is enable:
            found.append(generate(model, prompts(30)[0], new=8, **pass_cache(cache)))
            continue
        with pytest.warns(UserWarning, match=r"cannot be captured in a graph .*waits for the device"):
            found.append(generate(model, prompts(30)[0], new=8, **pass_cache(cache)))
    assert torch.equal(*found)
    assert recorder.replays == 0


def test_the_reference_is_never_captured(recorder: Recorder) -> None:
    model = rocketkv.compile(tiny_model("llama"))
    config = RocketKVConfig(backend="reference", **OPTIONS)
    generate(model, prompts(30)[0], new=8, **pass_cache(RocketKVCache(model.config, config)))
    assert recorder.tapes == []
