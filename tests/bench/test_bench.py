"""Tests of the benchmarks at tiny sizes: what they report and what they refuse; no test checks a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from rocketkv.bench import device as machine
from rocketkv.bench import memory, timing
from rocketkv.bench.geometries import GEOMETRIES, Geometry
from rocketkv.cli import app

TINY = ("--geometry", "smollm2-135m", "--seq-len", "512", "--token-budget", "128")
SWEEP = (*TINY[:2], "--seq-len", "512,600", "--token-budget", "64,128")
ROW = {"name", "seq_len", "token_budget", "batch", "median_ms", "min_ms", "max_ms", "repeats", "bytes"}


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the bandwidth on few bytes, because no test keeps a figure."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 2**17)


@pytest.fixture
def run() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(app, ["bench", *arguments])


def result_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    known = {"cpu", "cores", "threads", "memory_bytes", "last_level_cache_bytes", "accelerator"}
    assert set(record["machine"]) == known
    assert set(record["versions"]) == {"python", "torch", "transformers", "rocketkv", "instruction_set"}
    for row in record["rows"]:
        if "median_ms" in row:
            assert set(row) >= ROW
            assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    return record


def rows_named(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if row["name"] == name]


def assert_floor(record: dict[str, Any], name: str, of: str) -> None:
    """Check that a floor is the time that its row's bytes take at the measured bandwidth."""
    for floor, row in zip(rows_named(record, name), rows_named(record, of), strict=True):
        assert floor["bytes"] == row["bytes"] > 0
        assert floor["median_ms"] == pytest.approx(row["bytes"] / floor["bandwidth_gb_per_s"] / 1e6)


def test_attention_sweeps_and_reports(run: Any) -> None:
    record = result_of(run("attention", *SWEEP, "--repeats", "2", "--cold-mib", "1", "--json"))
    names = [row["name"] for row in record["rows"] if row["seq_len"] == 600]
    assert names[:5] == ["sparse", "sparse", "dense", "sdpa_grouped", "transformers_default"]
    assert names[5:] == ["sparse_floor", "sparse_floor", "dense_floor"]
    assert [row["token_budget"] for row in rows_named(record, "sparse")] == [64, 128, 64, 128]
    assert all(row["repeats"] == 2 for row in record["rows"] if not row["name"].endswith("_floor"))
    assert_floor(record, "sparse_floor", "sparse")
    assert_floor(record, "dense_floor", "dense")
    token_bytes = GEOMETRIES["smollm2-135m"].token_elements * 2
    for sparse, dense in zip(rows_named(record, "sparse")[::2], rows_named(record, "dense"), strict=True):
        assert dense["seq_len"] * token_bytes < dense["bytes"] < (dense["seq_len"] + 8) * token_bytes
        assert sparse["bytes"] < 1.3 * 64 * token_bytes
        assert sparse["layers"] * sparse["bytes"] > 0.7 * 2**20


def test_attention_compares_selection_methods(run: Any) -> None:
    sizes = ["--geometry", "smollm2-135m", "--seq-len", "900", "--token-budget", "128", "--repeats", "1"]
    record = result_of(
        run("attention", *sizes, "--cold-mib", "1", "--selection", "lowbit,hybrid,lowbit:int8", "--json")
    )
    lowbit, hybrid = rows_named(record, "sparse"), rows_named(record, "sparse:hybrid")
    (int8,) = rows_named(record, "sparse:lowbit:int8")
    assert len(lowbit) == len(hybrid) == 1
    assert lowbit[0]["bytes"] != hybrid[0]["bytes"]
    assert 0.97 * lowbit[0]["bytes"] < int8["bytes"] < lowbit[0]["bytes"]
    assert_floor(record, "sparse_floor", "sparse")
    assert_floor(record, "sparse:hybrid_floor", "sparse:hybrid")
    for device, message in (("cuda", "torch sees no GPU"), ("tpu", "choose from cpu, cuda")):
        if device == "tpu" or not torch.cuda.is_available():
            for command in ("attention", "decode", "prefill"):
                assert message in run(command, *sizes, "--device", device).stderr
    refused = run("attention", *sizes, "--selection", "lowbits")
    assert refused.exit_code != 0
    assert "selection='lowbits' does not exist; did you mean lowbit?" in refused.output


def test_decode_reports_every_path(run: Any) -> None:
    record = result_of(
        run("decode", *TINY, "--batch", "2", "--repeats", "2", "--dtype", "float32", "--paths", "eager", "--json")
    )
    names = [row["name"] for row in record["rows"]]
    assert names == ["rest", "rocketkv", "sparse_attention", "dense", "full", "sparse_floor", "dense_floor"]
    (full,), (dense,), (sparse,) = (rows_named(record, name) for name in ("full", "dense", "rocketkv"))
    assert full["kv_read_bytes"] == pytest.approx(dense["kv_read_bytes"], rel=0.02)
    assert sparse["kv_read_bytes"] < dense["kv_read_bytes"] / 3
    assert sparse["bytes"] - sparse["kv_read_bytes"] == 4 * GEOMETRIES["smollm2-135m"].num_parameters + 4 * 576 * 61
    assert sparse["tokens_per_second"] == pytest.approx(2000 / sparse["median_ms"])
    assert {row["path"] for row in (full, dense, sparse)} == {"eager"}
    assert full["interleaved"]
    assert_floor(record, "sparse_floor", "rocketkv")
    assert_floor(record, "dense_floor", "dense")
    (rest,), (attention,) = rows_named(record, "rest"), rows_named(record, "sparse_attention")
    for line, baseline in zip(record["comparisons"], (dense, full), strict=True):
        assert line["baseline"] == baseline["name"]
        best_ms = rest["median_ms"] + attention["median_ms"]
        assert line["amdahl_factor"] == pytest.approx(baseline["median_ms"] / best_ms)
        assert line["achieved_factor"] == pytest.approx(baseline["median_ms"] / sparse["median_ms"])
        assert line["share_percent"] == pytest.approx(100 * best_ms / sparse["median_ms"])


def test_decode_with_quantized_weights_reads_fewer_bytes(run: Any) -> None:
    record = result_of(run("decode", *TINY, "--repeats", "1", "--paths", "eager", "--weight-dtype", "int8", "--json"))
    (rest,) = rows_named(record, "rest")
    assert record["model"] == "smollm2-135m in int8"
    assert 1 < rest["bytes"] / GEOMETRIES["smollm2-135m"].num_parameters < 1.01


def test_decode_of_a_real_model_one_after_the_other(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import save_tiny

    save_tiny(tmp_path)
    monkeypatch.setattr("rocketkv.bench.decode.available_bytes", lambda device: 1000)
    monkeypatch.setattr("rocketkv.bench.decode.check_memory", lambda what, needed_bytes, device: None)
    result = run(
        "decode", "--model", str(tmp_path), "--seq-len", "300", "-t", "64", "--repeats", "1", "--paths", "eager"
    )
    assert result.exit_code == 0, result.output
    for part in ("300", "token budget 64", "full", "Not all caches fitted", "x as fast as dense; at best"):
        assert part in result.stdout


def test_prefill_tells_the_overhead(run: Any) -> None:
    record = result_of(run("prefill", *TINY, "--repeats", "2", "--json"))
    assert [row["name"] for row in record["rows"]] == ["rocketkv", "attention", "sdpa"]
    ours, alone, plain = record["rows"]
    assert ours["overhead_percent"] == pytest.approx(100 * (ours["median_ms"] / alone["median_ms"] - 1))
    assert plain["bytes"] == 512 * GEOMETRIES["smollm2-135m"].token_elements * 2
    num_operations = 4 * 9 * 64 * (512 * 513 / 2)
    assert plain["gflop_per_s"] == pytest.approx(num_operations / plain["median_ms"] / 1e6)


def test_prefill_of_a_whole_model(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GEOMETRIES, "tiny", Geometry("tiny", "qwen3", 2, 64, 4, 2, 32, 96, 128, True))
    tiny = ("--geometry", "tiny", "--seq-len", "2048", "--token-budget", "128")
    record = result_of(run("prefill", *tiny, "--repeats", "1", "--whole-model", "--json"))
    ours, theirs = record["rows"]
    assert (ours["name"], theirs["name"]) == ("model_rocketkv", "model_transformers")
    assert theirs["bytes"] == 2048 * 2 * 2 * 32 * 2 * 2
    assert ours["bytes"] < theirs["bytes"]


def test_memory_measures_every_case(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GEOMETRIES, "tiny", Geometry("tiny", "qwen3", 2, 64, 4, 2, 32, 96, 128, True))
    monkeypatch.setattr(memory, "measure_memory", memory.run_case)  # here; the next test starts a process
    tiny = ("--geometry", "tiny", *TINY[2:])
    record = result_of(run("memory", *tiny, "--prefill-len", "256", "--json"))
    rows = {row["name"]: row for row in record["rows"]}
    assert set(rows) == {"prefill_full", "prefill_rocketkv", "decode_full", "decode_rocketkv"}
    token_bytes = 2 * 2 * 32 * 2 * 2
    assert rows["prefill_full"]["kv_bytes"] == 256 * token_bytes
    assert rows["decode_full"]["kv_bytes"] == 514 * token_bytes
    assert rows["decode_rocketkv"]["token_budget"] == 128
    assert "peak MiB" in run("memory", *tiny, "--prefill-len", "256", "--phases", "decode").stdout


def test_memory_is_of_a_process_of_its_own() -> None:
    row = memory.measure_memory(memory.Case("smollm2-135m", "bfloat16", "decode", "rocketkv", 512, 128, 1))
    assert row["name"] == "decode_rocketkv"
    assert 0 < row["model_rss_bytes"] <= row["peak_rss_bytes"] < 2**31


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attention", "-g", "llama-3.1-9b"), "geometry='llama-3.1-9b' does not exist; did you mean llama-3.1-8b"),
        (("prefill", "-g", "x"), "choose from llama-3.1-8b, llama-3.2-1b, qwen3-8b, gemma3-270m, smollm2-135m."),
        (("attention", "--seq-len", "8k"), "seq-len='8k' is no list of numbers; separate numbers by commas"),
        (("decode", "--batch", "0"), "batch='0' has a number below 1; give positive ones."),
        (("prefill", "-t", "16"), "token_budget=16 is smaller than window_size=32"),
        (("attention", "--dtype", "int4"), "dtype='int4' does not exist; choose from auto, float32"),
        (("memory", "--phases", "sleep"), "phases='sleep' has 'sleep'; choose from prefill, decode."),
        (("attention", "--seq-len", "1000000000"), "GiB are available; lower --seq-len or --batch"),
        (("memory", "--seq-len", "1000000000", "--phases", "decode"), "decode of 1000000000 tokens x batch 1 with"),
        (("decode", *TINY, "--batch", "1000000"), "decoding after 512 tokens x batch 1000000 needs"),
        (("prefill", "--plot", "a.pdf"), "plot='a.pdf' is no picture that can be drawn; end it in .png or .svg."),
        (("prefill", "--plot", "/no/where/a.png"), "lies in a folder that does not exist"),
    ],
)
def test_what_cannot_be_is_one_sentence(run: Any, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_rounds_take_turns_and_stop() -> None:
    order: list[str] = []
    done: list[int] = []

    def call(name: str) -> timing.Call:
        return lambda: float(order.append(name) or 1.0)

    times = timing.run_rounds({"a": call("a"), "b": call("b")}, timing.Pace(repeats=3), done.append)
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert order == ["a", "b"] * 4  # the first round does not count
    assert done == [1, 2, 3]
    assert len(timing.run_rounds({"a": call("a")}, timing.Pace())["a"]) == timing.STABLE_ROUNDS
    assert len(timing.run_rounds({"a": call("a")}, timing.Pace(limit_s=0.0))["a"]) == timing.LEAST_ROUNDS


def test_stable_means_a_narrow_median() -> None:
    assert timing.is_stable([1.0] * 14 + [9.0])
    assert not timing.is_stable([1.0] * 14)
    assert not timing.is_stable([float(i) for i in range(1, 41)])
