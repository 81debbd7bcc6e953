"""Tests that damaged records are refused in a sentence that names the line and the field."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from eval_records import FIELDS, record, write_run
from rocketkv.errors import InputError
from rocketkv.eval.report.results import layer_means
from rocketkv.eval.report.runs import read_runs

DAMAGED: dict[str, list[Any]] = {
    **{name: [3, None, [], {}] for name in ("suite", "task", "id", "method", "prediction", "prompt")},
    **{name: [2.5, None, "x", True, -1, 10**30] for name in ("turn", "turns", "prompt_tokens", "kv_bytes", "rows")},
    **{name: ["x", [], True, -1] for name in ("length", "token_budget", "read_bytes")},
    **{name: ["x", None, math.nan, math.inf, 10**400] for name in ("prefill_s", "decode_s")},
    "depth": ["x", [0.5], math.nan],
    "scores": [3, None, [], {}, {"other": 1}, {"score": "1"}, {"score": None}, {"score": math.nan}, {"score": True}],
    "agrees": ["yes", 1],
    "kl": ["x", [0.1]],
    "output_error": [0.1, ["x"], [[0.1]]],
    "kept": [[0.1], [[0.1], [0.1, 0.2]]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in DAMAGED.items() for value in values])
def test_a_damaged_field_is_named(tmp_path: Path, name: str, value: Any) -> None:
    folder = write_run(tmp_path / "run", [FIELDS, FIELDS | {"id": "1", name: value}])
    with pytest.raises(InputError, match=rf"records\.jsonl, line 2 is no record of an evaluation \({name}="):
        read_runs([folder])


@pytest.mark.parametrize("name", list(record("quest", 64, "0", 1)))
def test_a_missing_field_is_no_record(tmp_path: Path, name: str) -> None:
    lacking = {other: value for other, value in FIELDS.items() if other != name}
    with pytest.raises(InputError, match="line 1 is no record of an evaluation"):
        read_runs([write_run(tmp_path / "run", [lacking])])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("records.jsonl", b"\x00\xff\xfe\n"),
        ("records.jsonl", b"\n"),
        ("records.jsonl", b"[" * 100_000 + b"\n"),
        ("records.jsonl", json.dumps(FIELDS | {"task": "\ud800"}).encode() + b"\n"),
        ("records.jsonl", json.dumps(FIELDS | {"turn": 1}).encode() + b"\n"),
        ("records.jsonl", 2 * (json.dumps(FIELDS).encode() + b"\n")),
        ("records.jsonl", None),
        ("records-1-of-2.jsonl.gz", gzip.compress(json.dumps(FIELDS).encode() + b"\n")[:-9]),
        ("records-1-of-2.jsonl.gz", b""),
        ("run.json", b"[]"),
        ("run.json", b"3"),
        ("run.json", b"\xff"),
        ("run.json", b"{" * 100_000),
        ("run.json", b'{"model": "\\ud800"}'),
        ("faults.jsonl", b"[]\n"),
        ("faults.jsonl", b'{"source": 3, "reason": "x"}\n'),
        ("faults.jsonl", b"\xff\n"),
        ("faults.jsonl", None),
    ],
)
def test_damaged_files_are_one_sentence(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = write_run(tmp_path / "run", [])
    if content is None:
        (folder / name).unlink()
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    if content == b"":
        assert read_runs([folder])[0].records == []  # as `gzip` reads it
        return
    with pytest.raises(InputError, match=r"is no record|cannot be read|is damaged|both hold"):
        read_runs([folder])


def test_lists_by_layer_of_different_lengths_are_refused() -> None:
    records = [FIELDS, FIELDS | {"id": "1", "output_error": [0.1]}]
    with pytest.raises(InputError, match="lists of output_error differ in length"):
        layer_means(records, "output_error")
