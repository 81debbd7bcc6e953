"""The check for GPUs runs at tiny sizes on the CPU, keeps what it has, and makes its tables."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # where `benchmarks` lies

from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check import parts, table
from rocketkv.bench import device


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(device, "READ_BYTES", 2**20)
    monkeypatch.setattr(device, "last_level_cache_bytes", lambda: 2**17)


def test_every_part_runs_at_tiny_sizes_and_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_pytest", lambda command, arguments: {"status": 0, "passed": 3, "failures": []})
    monkeypatch.setattr("shutil.which", lambda tool: None)
    record: dict[str, Any] = {"device": "cpu", "parts": {}}
    for name, (part, _) in parts.PARTS.items():
        rows = json.loads(json.dumps(part(parts.TINY), default=str))
        assert rows, name
        record["parts"][name] = {"state": "done", "seconds": 1.0, "rows": rows}
    shown = table.show(record)
    for text in (
        "| 600, 64, 1 |",
        "prototype",
        "| rocketkv | 600 | 32 |",
        "3 passed, 0 failed",
        "| dense | 600 |",
        "one by one",
    ):
        assert text in shown
    assert record["parts"]["sanitizer"]["rows"] == [{"state": "compute-sanitizer is not installed"}]


def test_a_failed_part_loses_no_other_and_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def run_part(name: str, seconds: float) -> dict[str, Any]:
        calls.append(name)
        state = "failed with status 1" if name == "kernels" and calls.count("kernels") == 1 else "done"
        return {"state": state, "seconds": 1.0, "rows": []}

    monkeypatch.setattr(check, "run_part", run_part)
    file = tmp_path / "new" / "record.json"
    assert check.main([str(file)]) == 1
    assert calls == list(parts.PARTS)
    assert check.main([str(file)]) == 0
    assert calls == [*parts.PARTS, "kernels"]
    assert "| kernels | done |" in file.with_suffix(".md").read_text()
    assert check.main([]) == 2


def test_a_part_is_a_process_of_its_own() -> None:
    assert check.run_part("machine", 0.01)["state"] == "stopped after 0 s"
    failed = check.run_part("nothing", 120)
    assert failed["state"] == "failed with status 1"
    assert "KeyError" in failed["error"]
