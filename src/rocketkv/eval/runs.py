"""The folders that runs fill, read for a report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocketkv.errors import InputError
from rocketkv.eval.records import Record, find_records, read_records

SAME_MODEL = ("model", "dtype", "weights")  # what must not differ between runs that stand in one table


@dataclass(frozen=True)
class Run:
    """What one folder holds.

    Attributes:
        name: of the folder.
        facts: what was run and on what, `run.json`, nested names joined by dots.
        records: one per sample, method, budget and turn.
        faults: rows that could not be evaluated, with `source` and `reason`.
    """

    name: str
    facts: Mapping[str, str]
    records: Sequence[Record]
    faults: Sequence[Mapping[str, str]]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the folders and see that they can stand in one report.

    Raises:
        InputError: a folder holds no run, a file is damaged, models differ, or an answer is there twice.
    """
    runs = [_read_run(folder) for folder in folders]
    for name in SAME_MODEL:
        values = {run.facts.get(name, "unknown") for run in runs}
        if len(values) > 1:
            raise InputError(f"the runs differ in {name} ({', '.join(sorted(values))}); report on one model at a time.")
    seen: dict[tuple[object, ...], str] = {}
    for run in runs:
        for record in run.records:
            names = ("suite", "task", "length", "id", "method", "token_budget", "turn")
            answer = tuple(record[name] for name in names)
            if answer in seen:
                what = f"{record['suite']}, {record['task']}, {record['id']}, {record['method']}"
                raise InputError(f"{seen[answer]} and {run.name} both hold {what}; give each run once.")
            seen[answer] = run.name
    return runs


def _read_run(folder: Path) -> Run:
    if not (folder / "run.json").is_file():
        raise InputError(f"{folder} holds no run.json, so it is no run; give the --out of `rocketkv eval run`.")
    [facts] = _read_json(folder / "run.json", [(folder / "run.json").read_text(encoding="utf-8")])
    records = read_records(find_records(folder))
    faults = []
    for path in sorted(folder.glob("faults*.jsonl")):
        faults += _read_json(path, path.read_text(encoding="utf-8").split("\n")[:-1])  # without a torn last line
    if facts.get("mode") == "multi_request":
        records = [record | {"suite": f"{record['suite']} (multi request)"} for record in records]
    return Run(folder.name, _flatten(facts), records, faults)


def _read_json(path: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    try:
        return [json.loads(text) for text in texts]
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); run again into a new folder.") from None


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every fact as a text."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flat
