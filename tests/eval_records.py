"""Records of an evaluation, written by hand, for the tests of its report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, BINS = 3, 32
MIB = 2**20


def record(method: str, budget: int | None, sample: str, score: float, **fields: Any) -> dict[str, Any]:
    return {
        "suite": "niah", "task": "passkey", "id": sample, "length": 1024, "depth": None, "turn": 0, "turns": 1,
        "method": method, "token_budget": budget, "prediction": "", "scores": {"score": score}, "agrees": None,
        "prompt": "", "prompt_tokens": 1000, "new_tokens": 8, "read_bytes": 4 * MIB if budget is None else MIB,
        "kv_bytes": 8 * MIB, "group_size": 3, "prefill_s": 3.0, "decode_s": 1.0, "rows": 3,
    } | fields  # fmt: skip


def answers(method: str, budget: int | None, scores: Sequence[float], **fields: Any) -> list[dict[str, Any]]:
    return [record(method, budget, str(number), score, **fields) for number, score in enumerate(scores)]


def write_run(
    folder: Path, records: Sequence[dict[str, Any]], faults: Sequence[dict[str, str]] = (), **facts: Any
) -> Path:
    folder.mkdir()
    facts = {"model": "smollm2", "dtype": "float32", "versions": {"torch": "2.13"}} | facts
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    for name, lines in (("records", records), ("faults", faults)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def rows_of(table: str) -> list[dict[str, str]]:
    """Return a Markdown table's rows by the names in its head; of equal names the first counts."""
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return [dict(zip(reversed(header), reversed(row), strict=True)) for row in rows]


def array(*values: float) -> np.ndarray:
    return np.array(values)


FIELDS = record("quest", 64, "0", 1) | {"kl": 0.1, "output_error": [0.1] * LAYERS, "kept": [[0.1] * BINS] * LAYERS}
