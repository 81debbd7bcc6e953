"""`rocketkv eval run`: a killed run goes on, the table at the end, and options that are refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from eval_runs import key, plain
from rocketkv.cli import app
from tiny import save_tiny


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


def arguments(model_folder: Path, out: Path, samples: int = 2) -> list[str]:
    return [
        "eval", "run", "--suite", "niah", "--model", str(model_folder), "--methods", "full,rocketkv,snapkv,quest",
        "--budgets", "48,64", "--lengths", "700", "--samples", str(samples), "--out", str(out),
    ]  # fmt: skip


def read_records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_a_run_that_is_killed_loses_and_repeats_nothing(model_folder: Path, tmp_path: Path) -> None:
    whole = CliRunner().invoke(app, arguments(model_folder, tmp_path / "whole"))
    assert whole.exit_code == 0, whole.output
    path = tmp_path / "killed" / "records.jsonl"
    command = [sys.executable, "-m", "rocketkv", *arguments(model_folder, tmp_path / "killed")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    end = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    expected = read_records(tmp_path / "whole")
    left = path.read_bytes().count(b"\n")
    assert 0 < left < len(expected)
    resumed = CliRunner().invoke(app, arguments(model_folder, tmp_path / "killed"))
    assert resumed.exit_code == 0, resumed.output
    records = read_records(tmp_path / "killed")
    assert plain(records) == plain(expected)
    assert len({key(record) for record in records}) == len(records) == 2 * 10 * 7


def test_the_command_ends_with_a_table_and_what_was_saved(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*arguments(model_folder, tmp_path, samples=1), "--shard", "2/4"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/rocketkv", *given])
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    rows = [line.split()[:2] for line in result.stdout.splitlines() if "%" in line]
    assert rows[:4] == [["full", rows[0][1]], ["rocketkv", "48"], ["snapkv", "48"], ["quest", "48"]]
    assert "for each method on its own it would have taken" in result.stdout
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["suite"] == "niah"
    assert written["commands"] == [" ".join(["rocketkv", *given])]
    assert {"machine", "versions"} < set(written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--suite", "glue"],
            "suite 'glue' does not exist; choose from niah, ruler, longbench, scbench, qa, rows or fidelity.",
        ),
        (["--methods", "h2o"], "method 'h2o' does not exist"),
        (["--budgets", "16"], "token_budget=16 is smaller than window_size=32"),
        (["--mode", "chat"], "mode='chat' does not exist; choose from multi_turn, multi_request."),
        (["--parity", "kvpress"], "parity='kvpress' does not exist; choose from rocketkv."),
        (["--shard", "3/2"], "shard='3/2' is no part of a whole; give i/n with i from 1 to n, as in 1/3."),
        (["--shard", "one"], "shard='one' is no part of a whole"),
        (["--data", "nowhere"], "there is no nowhere; give the path of a file or folder"),
        (["--tasks", "needle"], "needle"),
        (
            ["--suite", "fidelity", "--tasks", "prose", "--mode", "multi_request"],
            "fidelity has no use for --tasks and --mode; run it without.",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(
    model_folder: Path, tmp_path: Path, changes: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(app, [*arguments(model_folder, tmp_path), *changes])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "records.jsonl").exists() or (tmp_path / "records.jsonl").read_text() == ""
    assert not (tmp_path / "run.json").exists()


def test_faults_make_the_command_fail(model_folder: Path, tmp_path: Path) -> None:
    lengths = ["--lengths", "700,1980"]  # the longer ones leave no room for the answer
    result = CliRunner().invoke(app, [*arguments(model_folder, tmp_path, samples=1), *lengths, "--shard", "1/5"])
    faults = (tmp_path / "faults-1-of-5.jsonl").read_text().splitlines()
    assert result.exit_code == (1 if faults else 0), result.output
    if faults:
        assert f"{len(faults)} samples could not be evaluated" in result.stderr
