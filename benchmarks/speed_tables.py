"""The tables of docs/benchmarks.md, in Markdown, from the results committed in benchmarks/results (`make bench`).

    .venv/bin/python benchmarks/speed_tables.py

Medians in ms; in brackets how many times the floor, the time in which memory gives the bytes that the row must read.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rocketkv.bench.timing import floor_of
from rocketkv.eval.report.markdown import table

HERE = Path(__file__).parent / "results"
AXES = ("seq_len", "token_budget", "batch")
OURS = {"sparse": "low-bit keys", "sparse:hybrid": "page bounds"}
THEIRS = {"dense": "our dense", "sdpa_grouped": "SDPA, grouped", "transformers_default": "transformers' default"}


class Rows:
    """The rows of one result."""

    def __init__(self, name: str) -> None:
        self.result: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text())
        self.rows: list[dict[str, Any]] = self.result["rows"]

    def values(self, axis: str) -> list[int]:
        """Name what was swept."""
        return sorted({row[axis] for row in self.rows if row[axis] is not None})

    def find(self, name: str, **at: object) -> dict[str, Any] | None:
        """Return the row of a name at these values; a row without a token budget is found at every budget."""
        for row in self.rows:
            if row["name"] == name and all(row.get(axis) in (value, None) for axis, value in at.items()):
                return row
        return None

    def cell(self, name: str, **at: object) -> str:
        """Return a row's median and its distance from the floor."""
        row = self.find(name, **at)
        if row is None:
            return "-"
        floor = self.find(floor_of(name) or "dense_floor", **at)
        return digits(row["median_ms"]) + (f" ({digits(row['median_ms'] / floor['median_ms'], 2)})" if floor else "")

    def times_faster(self, name: str, than: str, **at: object) -> str:
        """Return how many times faster the row `name` is than the row `than`."""
        row, other = self.find(name, **at), self.find(than, **at)
        return "-" if row is None or other is None else digits(other["median_ms"] / row["median_ms"], 2)


def digits(number: float, count: int = 3) -> str:
    """Return a number with so many digits, or with all of those before the point."""
    return f"{float(f'{number:.{count}g}'):,.10g}" if number < 10**count else f"{number:,.0f}"


def by(rows: Rows, axis: str, budgets: Sequence[int | None]) -> None:
    """Print a table with a column per value of an axis: our rows, theirs, ours against dense, the memory."""
    columns = rows.values(axis)

    def line(title: str, name: str, budget: int | None) -> list[str]:
        at = {} if budget is None else {"token_budget": budget}
        return [title, *(rows.cell(name, **{**at, axis: value}) for value in columns)]

    lines = [
        line(title if budget is None else f"{title}, t = {budget:,}", name, budget)
        for name, title in OURS.items()
        for budget in budgets
    ]
    lines += [line(title, name, None) for name, title in THEIRS.items()]
    for name, title in OURS.items():
        for budget in budgets:
            at = {} if budget is None else {"token_budget": budget}
            ratios = [rows.times_faster(name, "dense", **{**at, axis: value}) for value in columns]
            lines.append([f"dense / {title}" + (f", t = {budget:,}" if budget else ""), *ratios])
    floors = [rows.find("dense_floor", **{axis: value}) for value in columns]
    lines.append(
        ["memory read at, GB/s", *("-" if floor is None else f"{floor['bandwidth_gb_per_s']:.0f}" for floor in floors)]
    )
    print(table(["", *(f"{value:,}" for value in columns)], lines) + "\n")


def whole_model(names: Sequence[str]) -> None:
    """Print a table of a model's steps beside the rest of a step, our dense cache and transformers' own."""
    lines = []
    for rows in map(Rows, names):
        for line in rows.result["comparisons"]:
            if line["baseline"] != "full":
                continue
            at = {"batch": line["batch"], "path": line["path"]}
            medians = [rows.find(name, **at) for name in ("rest", "rocketkv", "dense", "full")]
            over_dense = next(
                each
                for each in rows.result["comparisons"]
                if each["baseline"] == "dense" and all(each[key] == value for key, value in at.items())
            )
            lines.append(
                [str(line["batch"]), line["path"]]
                + [digits(row["median_ms"]) if row else "-" for row in medians]
                + [f"{over_dense['share_percent']:.0f}%"]
                + [digits(each["achieved_factor"], 2) for each in (over_dense, line)]
            )
    header = ["batch", "path", "rest", "RocketKV", "our dense", "transformers' default", "of Amdahl's limit over dense"]
    print(table([*header, "x our dense", "x transformers"], lines) + "\n")


def weights() -> None:
    """Print a table of steps with weights of fewer bits."""
    lines = []
    for name in ("bfloat16", "int8", "int4"):
        rows = Rows(f"model-{name}")
        cells = [rows.find("rocketkv", batch=batch, path="fast") for batch in (1, 4)]
        lines.append([name, *(digits(row["median_ms"]) if row else "-" for row in cells)])
    print(table(["weights", "batch 1", "batch 4"], lines) + "\n")


def main() -> None:
    """Print them all."""
    for name, axis in (("layer-by-length", "seq_len"), ("layer-short", "seq_len")):
        rows = Rows(name)
        print(f"## {name}\n")
        by(rows, axis, rows.values("token_budget"))
    for name, axis in (("layer-by-budget", "token_budget"), ("layer-by-batch", "batch")):
        print(f"## {name}\n")
        by(Rows(name), axis, (None,))
    print("## model-long\n")
    whole_model(("model-long", "model-long-batch-4", "model-short"))
    print("## weights\n")
    weights()
    for name in ("prefill", "memory"):
        print(f"## {name}\n")
        rows = Rows(name)
        shown = ("name", *AXES, "median_ms", "overhead_percent", "kv_bytes", "peak_rss_bytes")
        columns = [key for key in shown if any(key in row for row in rows.rows)]
        print(table(columns, [[str(row.get(key, "")) for key in columns] for row in rows.rows]) + "\n")


if __name__ == "__main__":
    main()
