"""Benchmarks that replay graphs: here a tape takes a graph's place. What they time is what a step is."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rocketkv.backends import Spec, cpp
from rocketkv.bench import device, graphs, paths
from rocketkv.bench.decode import measure_decode
from rocketkv.bench.geometries import GEOMETRIES, Geometry
from rocketkv.bench.model import build_model
from rocketkv.bench.tensors import loaded_cache, random_tokens, sparse_config
from rocketkv.bench.timing import Pace, Point
from rocketkv.cli import app
from rocketkv.hf.recording import RECORDERS
from tape import Tape

TINY = Geometry("tiny", "qwen3", 2, 64, 4, 2, 32, 96, 128, True)

if (reason := cpp.decline(Spec("cpu", torch.float32, 32))) is not None:
    pytest.skip(f"{reason}; only the steps of a backend are captured", allow_module_level=True)


def test_replays_are_steps_and_outlast_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDERS, "cpu", Tape)
    config, shape = sparse_config(64), (1, 2, 300, 32)
    keys, values = (random_tokens(*shape, torch.float32) for _ in range(2))
    query, key = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 1, 32)
    caches, twins = ([loaded_cache(config, keys, values, 300) for _ in range(2)] for _ in range(2))
    outputs: list[torch.Tensor] = []

    def work() -> torch.Tensor:
        outputs.append(torch.stack([cache.decode(query, key, key) for cache in caches]))
        return outputs[-1]

    replayed = graphs.Replayed(work, caches, "cpu")
    with torch.inference_mode():
        for _ in range(60):
            assert replayed() > 0
        while twins[0].num_seen < caches[0].num_seen:
            expected = torch.stack([cache.decode(query, key, key) for cache in twins])
    torch.testing.assert_close(outputs[-1], expected, rtol=0, atol=0)
    assert len(outputs) > 2  # the first capture did not last
    assert len(outputs) < 20


def test_a_capture_that_takes_the_last_step_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDERS, "cpu", Tape)
    keys, values = (random_tokens(1, 2, 300, 32, torch.float32) for _ in range(2))
    cache, twin = (loaded_cache(sparse_config(64), keys, values, 300) for _ in range(2))
    query, key = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 1, 32)
    work, decoder = partial(cache.decode, query, key, key), cache._decoder
    replayed = graphs.Replayed(work, [cache], "cpu")
    with torch.inference_mode():
        work()
        while decoder._steps_left > 2:  # one for the call that prepares, and one for the capture
            work()
        assert replayed() > 0
        assert decoder._steps_left > 0
        while twin.num_seen < cache.num_seen:
            expected = twin.decode(query, key, key)
        assert replayed._recording is not None
        torch.testing.assert_close(replayed._recording.output, expected, rtol=0, atol=0)


def test_a_layer_without_a_step_to_replay_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDERS, "cpu", Tape)
    keys = random_tokens(1, 2, 300, 32, torch.float32)
    cache = loaded_cache(replace(sparse_config(64), backend="reference"), keys, keys, 300)
    query, key = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 1, 32)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no step that a graph can replay"):
        graphs.Replayed(lambda: cache.decode(query, key, key), [cache], "cpu")()


def test_a_models_step_and_its_attention_alone_share_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes: list[Tape] = []

    def record(work: Any, where: torch.device) -> Tape:
        tapes.append(Tape(work, where))
        return tapes[-1]

    monkeypatch.setitem(RECORDERS, "cpu", record)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(device, "READ_BYTES", 2**20)
    monkeypatch.setattr(device, "last_level_cache_bytes", lambda: 2**17)
    model = build_model(TINY, torch.float32)
    rows, comparisons, _ = measure_decode(model, Point(300, 1, [64], Pace(8)), ["fast"])
    names = {row.name for row in rows}
    assert names == {"rest", "rocketkv", "sparse_attention", "dense", "full", "static"}
    assert len(comparisons) == 2
    assert len(tapes) == len(names) - 1  # each but `full` is captured once


def test_what_a_gpu_is_compared_with_is_attention_to_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2, TINY.num_kv_heads, 40, TINY.head_dim)
    keys, values = (random_tokens(*shape, torch.float32) for _ in range(2))
    dense = [loaded_cache(sparse_config(4096), keys, values, 40)]
    query, key = torch.randn(2, TINY.num_heads, 1, TINY.head_dim), torch.randn(2, TINY.num_kv_heads, 1, TINY.head_dim)
    grouped = paths.sdpa_grouped(dense).attend(0, query, key, key)
    torch.testing.assert_close(paths.sdpa_gqa(dense).attend(0, query, key, key), grouped, rtol=1e-5, atol=1e-5)
    static = paths.transformers_static(keys, values, dense, TINY).attend(0, query, key, key)
    ours = paths.ours("dense", None, dense).attend(0, query, key, key)
    torch.testing.assert_close(static.transpose(1, 2), ours, rtol=1e-5, atol=1e-5)


def test_capacity_fits_more_rows_when_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    sizes = ["--geometry", "tiny", "--seq-len", "2000", "--token-budget", "64", "--repeats", "2"]

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["bench", "capacity", *sizes, *arguments])

    result = run("--memory-gib", "0.005", "--json")
    assert result.exit_code == 0, result.output
    dense, ours = json.loads(result.stdout)["rows"]
    assert (dense["name"], ours["name"], ours["token_budget"]) == ("dense", "rocketkv", 64)
    assert ours["batch"] > 2 * dense["batch"] > 0
    for row in (dense, ours):
        assert 0.3 * 0.005 * 2**30 < row["bytes"] < 0.005 * 2**30
        assert row["tokens_per_second"] == pytest.approx(1000 * row["batch"] / row["median_ms"])
    assert "one row of 2000 tokens takes" in run("--memory-gib", "0.0001").stderr
    assert "GiB are available; give less." in run("--memory-gib", "1e6").stderr
    assert "--batch 3 has no effect" in run("--batch", "3").stderr
