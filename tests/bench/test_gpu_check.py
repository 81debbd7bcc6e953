"""The check for GPUs runs at tiny sizes on the CPU, keeps what it has, and makes its tables."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # where `benchmarks` lies

from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check import parts, run_tests, table
from rocketkv.bench import device


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(device, "READ_BYTES", 2**20)
    monkeypatch.setattr(device, "last_level_cache_bytes", lambda: 2**17)


def test_every_part_runs_at_tiny_sizes_and_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [{"test": "t.py::one", "outcome": "passed"}, {"test": "t.py::two", "outcome": "failed"}]
    monkeypatch.setattr(parts, "run_tests", lambda command, arguments: iter(outcomes))
    monkeypatch.setattr("shutil.which", lambda tool: None)
    record: dict[str, Any] = {"device": "cpu", "parts": {}}
    for name, (part, _) in parts.PARTS.items():
        rows = json.loads(json.dumps(list(part(parts.TINY)), default=str))
        assert rows, name
        assert [row for row in rows if "error" in row] == []
        record["parts"][name] = {"state": "done", "seconds": 1.0, "rows": rows}
    versions, backends = record["parts"]["machine"]["rows"][1:]
    assert {"triton", "cuda-core", "cuda-bindings"} <= set(versions)
    assert "backend cpp" in backends
    used = "cpp" if backends["backend cpp"] == "decodes" else "reference"
    shown = table.show(record)
    for text in (
        "| 600, 64, 1 |",
        "prototype",
        f"sparse by {used}",
        f"| rocketkv | 600 | 32 | 1 | {used} |",
        "| largest batch, rocketkv | 600 | 32 | 2 |",
        "tests: 1 passed, 1 failed",
        "- t.py::two failed",
        "| dense | 600 |",
        "one by one",
    ):
        assert text in shown
    assert record["parts"]["sanitizer"]["rows"] == [{"state": "compute-sanitizer is not installed"}]


def test_a_case_that_fails_is_told_of_and_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(seq_len: int, token_budget: int, batch: int) -> list[dict[str, Any]]:
        if batch == 2:
            raise torch.OutOfMemoryError("no memory")
        return [{"batch": batch}]

    cases = [(600, 32, 1), (600, 32, 2), (600, 32, 3)]
    monkeypatch.setitem(parts.PARTS, "models", (lambda sizes: parts._each(cases, measure), 1))
    assert check.main(["--part", "models"]) == 1
    rows, others = check.read_rows("noise\n" + capsys.readouterr().out + '{"half')
    error = {"seq_len": 600, "token_budget": 32, "batch": 2, "error": "OutOfMemoryError: no memory"}
    assert rows == [{"batch": 1}, error, {"batch": 3}]
    assert others == 'noise\n{"half\n'
    part = {"state": "failed with status 1", "seconds": 1.0, "rows": rows[1:2]}
    assert "OutOfMemoryError: no memory" in table.show({"parts": {"models": part}})


def test_a_failed_part_loses_no_other_and_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    allowed: list[float] = []

    def run_part(name: str, seconds: float) -> dict[str, Any]:
        calls.append(name)
        allowed.append(seconds)
        count = calls.count("machine")
        if name != "machine" or count == 3:
            return {"state": "done", "seconds": 1.0, "rows": []}
        return {"state": "failed with status 1", "seconds": 1.0, "rows": [{}, {}][count - 1 :]}

    monkeypatch.setattr(check, "run_part", run_part)
    file = tmp_path / "new" / "record.json"
    assert check.main([str(file)]) == 1
    assert calls == list(parts.PARTS)
    limits = [limit for _, limit in parts.PARTS.values()]
    assert sum(limits) <= check.TOTAL_SECONDS
    assert all(seconds > limit - 5 for seconds, limit in zip(allowed, limits, strict=True))
    assert check.main([str(file)]) == 1
    assert allowed[-1] > check.TOTAL_SECONDS - 5  # what is left to do has all the time
    assert json.loads(file.read_text())["parts"]["machine"]["rows"] == [{}, {}]  # the second call had only one
    assert check.main([str(file)]) == 0
    assert calls == [*parts.PARTS, "machine", "machine"]
    assert "| machine | done |" in file.with_suffix(".md").read_text()
    assert check.main([]) == 2


def test_a_part_is_a_process_of_its_own_whose_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = check.run_part("nothing", 120)
    assert failed["state"] == "failed with status 1; rows until then: 0"
    assert "KeyError" in failed["error"]
    script = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(script))
    for end, seconds, state in (
        ("exec sleep 60", 2.0, "stopped after 2 s; rows until then: 1"),
        ("exit 3", 60.0, "failed with status 3; rows until then: 1"),
        ("exit 0", 60.0, "done"),
    ):
        script.write_text(f"#!/bin/sh\necho '{{\"us\": 1}}'\necho noise\n{end}\n")
        script.chmod(0o755)
        part = check.run_part("machine", seconds)
        assert (part["state"], part["rows"]) == (state, [{"us": 1}])
        assert ("noise" in part.get("error", "")) == (state != "done")


def test_each_test_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # it begins sooner without them
    file = tmp_path / "test_it.py"
    file.write_text("def test_one(): pass\ndef test_two(): assert False\n")
    *rows, end = run_tests.run_tests([sys.executable], ["--noconftest", str(file)])
    assert [(row["test"].partition("::")[2], row["outcome"]) for row in rows] == [
        ("test_one", "passed"),
        ("test_two", "failed"),
    ]
    assert end["error"] == "pytest ended with status 1"
    found = run_tests.TOGETHER.match("[gw3] [ 50%] SKIPPED tests/a.py::test_x[cuda-lowbit] ")
    assert found is not None
    assert found.groups() == ("SKIPPED", "tests/a.py::test_x[cuda-lowbit]")


def test_kernels_are_timed_and_not_the_calls_that_start_them() -> None:
    gpu, host = SimpleNamespace(name="CUDA"), SimpleNamespace(name="CPU")
    events = [
        SimpleNamespace(key="choose", device_type=gpu, device_time_total=3.0, cpu_time_total=0.0),
        SimpleNamespace(key="cudaGraphLaunch", device_type=host, device_time_total=3.0, cpu_time_total=9.0),
    ]
    assert parts.total_times(events, "cuda") == {"choose": 3.0}
    assert parts.total_times(events, "cpu") == {"cudaGraphLaunch": 9.0}
