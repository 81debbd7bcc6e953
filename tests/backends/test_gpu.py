"""Tests that need a GPU: the kernels run there alone, in a graph and inside a model; and how fast they are.

`pytest -m gpu` runs these where there is one.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import rocketkv
from layers import DTYPES, check_steps, make_layer
from rocketkv import RocketKVCache, RocketKVConfig, enable
from rocketkv.backends import Backend, LayerTensors, Scoring, Spec, Step, cuda, triton
from rocketkv.cli import app
from rocketkv.hf.recording import RECORDERS, CudaRecording
from rocketkv.hf.versions import pass_cache
from rocketkv.ops import LowBitKeys, PageBounds, topk_mask
from tiny import generate, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch sees no GPU here, so nothing that runs on one was tested"
    ),
]


def on_gpu(layer: LayerTensors) -> LayerTensors:
    """Return the same storage on a GPU."""
    tensors = {name: each.cuda() for name, each in vars(layer).items() if isinstance(each, torch.Tensor)}
    pages = None if layer.pages is None else PageBounds(*(x if x is None else x.cuda() for x in layer.pages))
    lowbit = None if layer.lowbit is None else LowBitKeys(*(x.cuda() for x in layer.lowbit))
    return replace(layer, pages=pages, lowbit=lowbit, **tensors)


@pytest.fixture(params=[cuda, triton], ids=lambda backend: backend.NAME)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend of GPUs."""
    found: Backend = request.param
    if reason := found.decline(Spec("cuda", torch.float32, 64)):
        pytest.skip(f"{found.NAME}: {reason}")
    return found


class OnGpu:
    """A backend for storage on the CPU, which it copies to the GPU and back."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def bind(self, layer: LayerTensors) -> Step:
        there = on_gpu(layer)
        step = self.backend.bind(there)

        def call(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chosen: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            report = chosen.cuda()
            output, read_bytes = step(query.cuda(), key.cuda(), value.cuda(), report)
            chosen.copy_(report)
            for name, mine in vars(layer).items():
                if isinstance(mine, torch.Tensor):
                    mine.copy_(getattr(there, name))
            for mine, its in zip(layer.index, there.index, strict=True):
                mine.copy_(its)
            return output.cpu(), read_bytes.cpu()

        return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", [Scoring.DENSE, Scoring.PAGES, Scoring.BOUNDS, Scoring.EXACT, Scoring.LOWBIT])
def test_steps_are_the_references(backend: Backend, scoring: str, dtype: torch.dtype) -> None:
    here = OnGpu(backend)
    lengths = [[5000, 300], [61, 4095]]
    generator = torch.Generator().manual_seed(0)
    for group, head_dim in ((4, 128), (3, 64), (5, 80), (8, 96), (1, 256)):
        options = {"group": group, "head_dim": head_dim, "dtype": dtype, "recents": 3}
        check_steps(here, make_layer(generator, scoring, lengths, **options), generator, steps=5)
        if scoring != Scoring.EXACT and dtype != torch.float32:
            check_steps(here, make_layer(generator, scoring, lengths, int8=True, **options), generator, steps=5)


@pytest.mark.parametrize("scoring", [Scoring.DENSE, Scoring.PAGES, Scoring.LOWBIT])
def test_a_step_is_captured_in_a_graph_and_replayed(backend: Backend, scoring: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [on_gpu(make_layer(torch.Generator().manual_seed(1), scoring, [[3000, 127]])) for _ in range(2)]
    tokens = [torch.randn(1, heads, 1, 64, generator=generator).cuda() for heads in (6, 2, 2)]
    backend.bind(on_gpu(make_layer(generator, scoring, [[3000, 127]])))(*tokens)  # this first step compiles
    captured, plain = (backend.bind(layer) for layer in layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = captured(*tokens)
    for _ in range(5):
        for token in tokens:
            token.copy_(torch.randn(token.shape, generator=generator))
        graph.replay()
        torch.testing.assert_close(output, plain(*tokens)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(layers[0].lengths, layers[1].lengths)


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_model_generates_what_it_does_on_the_cpu(mode: str) -> None:
    model = enable(tiny_model("llama"))
    ids = torch.randint(100, (2, 150), generator=torch.Generator().manual_seed(0))
    config = RocketKVConfig(token_budget=26, mode=mode, dense_below=0, window_size=8, kernel_size=5)
    answers = []
    for device in ("cpu", "cuda"):
        cache = RocketKVCache(model.to(device).config, config)
        tokens = model.generate(
            ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            **pass_cache(cache),
            max_new_tokens=12,
            do_sample=False,
        )
        answers.append(tokens.tolist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_compiled_model_generates_the_same_tokens_from_one_graph(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[object] = []

    class Counted(CudaRecording):
        def __init__(self, work: Callable[[], torch.Tensor], device: torch.device) -> None:
            super().__init__(work, device)
            captured.append(self)

    monkeypatch.setitem(RECORDERS, "cuda", Counted)
    ids = torch.randint(100, (2, 150), generator=torch.Generator().manual_seed(0)).cuda()
    config = RocketKVConfig(token_budget=60, mode=mode, dense_below=0, window_size=8, kernel_size=5)
    answers = []
    for prepare in (enable, rocketkv.compile):
        model = prepare(tiny_model("llama").cuda())
        cache = RocketKVCache(model.config, config)
        answers.append(generate(model, ids, new=30, **pass_cache(cache)).tolist())
        assert cache.compressed_layers[0].cache.num_decoded == 29
    assert answers[0] == answers[1]
    assert len(captured) == 1


def test_a_capture_that_breaks_off_leaves_the_device_usable() -> None:
    numbers, stream = torch.ones(4, device="cuda"), torch.cuda.current_stream()
    other = CudaRecording(lambda: 2 * numbers, numbers.device)
    with pytest.raises(RuntimeError):
        CudaRecording(lambda: numbers * numbers.sum().item(), numbers.device)
    assert torch.cuda.current_stream() == stream
    assert int(torch.multinomial(numbers, 1)) < 4  # the device's generator is not left in a capture
    numbers.fill_(3.0)
    other.replay()
    assert other.output.tolist() == [6.0] * 4
    assert CudaRecording(lambda: numbers + 1, numbers.device).output.tolist() == [4.0] * 4


def test_stage_1_takes_the_same_tokens_of_plateaus_as_on_the_cpu() -> None:
    levels = torch.randint(0, 9, (3, 4, 5000), generator=torch.Generator().manual_seed(0)) / 9
    scores = torch.nn.functional.max_pool1d(levels, 63, stride=1, padding=31)
    given = {"candidates": torch.randint(1, 5001, (3, 4)), "num_tokens": torch.tensor([100, 3000, 5000])}
    there = topk_mask(scores.cuda(), **{name: x.cuda() for name, x in given.items()})
    assert torch.equal(there.cpu(), topk_mask(scores, **given))


def test_a_step_is_timed_beside_torchs() -> None:
    sizes = ["--geometry", "llama-3.1-8b", "--seq-len", "16384", "--token-budget", "512", "--repeats", "3"]
    result = CliRunner().invoke(app, ["bench", "attention", *sizes, "--device", "cuda"])
    assert result.exit_code == 0, result.output
    assert "sdpa_gqa" in result.output
    assert "transformers_static" in result.output
    print(result.output)


@pytest.mark.parametrize("command", [("decode", "--paths", "fast"), ("prefill",), ("capacity", "--most-rows", "4")])
def test_models_and_prefills_are_timed_too(command: tuple[str, ...]) -> None:
    sizes = ["--geometry", "llama-3.2-1b", "--seq-len", "8192", "--token-budget", "256", "--repeats", "3"]
    result = CliRunner().invoke(app, ["bench", *command, *sizes, "--device", "cuda"])
    assert result.exit_code == 0, result.output
    print(result.output)
