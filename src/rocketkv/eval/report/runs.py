"""Reads the folders that runs have filled, for a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocketkv.errors import InputError
from rocketkv.eval.run.records import Record, find_records, parse, read_records

SAME_MODEL = ("model", "dtype", "weight_dtype")  # the facts that must be equal in all runs of one table


@dataclass(frozen=True)
class Run:
    """The content of one folder.

    Attributes:
        name: the folder's name.
        facts: the facts in `run.json` about the run and the machine, with nested names joined by dots.
        records: the answers, one record per sample, method, budget and turn.
        faults: the rows that could not be evaluated, with `source` and `reason`.
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
    [facts] = _read_objects(folder / "run.json")
    records = read_records(find_records(folder))
    faults = []
    for path in sorted(folder.glob("faults*.jsonl")):
        faults += _read_objects(path, ("source", "reason"))
    if facts.get("mode") == "multi_request":
        records = [record | {"suite": f"{record['suite']} (multi request)"} for record in records]
    return Run(folder.name, _flatten(facts), records, faults)


def _read_objects(path: Path, texts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the object of a .json file, or the whole lines' objects of a .jsonl file, each with some `texts`."""
    found = []
    try:
        content = path.read_bytes()
        for part in content.split(b"\n")[:-1] if path.suffix == ".jsonl" else [content]:
            value = parse(part)
            if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in texts):
                raise ValueError(f"{str(value)[:60]} is no object with {' and '.join(texts) or 'names'}")
            found.append(value)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give another folder.") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); run again into a new folder.") from None
    return found


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return every fact as a text."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flat
