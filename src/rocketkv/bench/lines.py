"""The lines of a plot: which rows belong to one."""

from collections.abc import Sequence

from rocketkv.bench.output import AXES, Record, distinct
from rocketkv.bench.words import WORDS

MOST_LINES = 6  # more than these, and variants of the selection and budgets in the middle are left to the table
PARTS = ("rest", "sparse_attention")  # rows that time a part of a step


def swept_axis(rows: Sequence[Record]) -> str:
    """Return the name of what was swept, the length first."""
    return next((name for name in AXES if len(distinct(rows, name)) > 1), "seq_len")


def lines_of(rows: Sequence[Record], axis: str) -> dict[str, list[Record]]:
    """Return the rows that belong to one line, by its label; at most `MOST_LINES` of them where that can be had.

    Floors and parts of a step have no line.
    """
    rows = [row for row in rows if row["name"] not in PARTS and not row["name"].endswith("_floor")]
    others = [name for name in AXES if name != axis and len(distinct(rows, name)) > 1]
    several_paths = len({row.get("path") for row in rows}) > 1

    def sort(chosen: Sequence[Record]) -> dict[str, list[Record]]:
        lines: dict[str, list[Record]] = {}
        for row in chosen:
            name = WORDS.get(row["name"], row["name"].replace("sparse:", "RocketKV, ").replace("_", " "))
            parts = [f"{AXES[other]} {row[other]:,}" for other in others if row[other] is not None]
            parts += ["compiled"] * (several_paths and row["path"] == "fast")
            lines.setdefault(", ".join([name, *parts]), []).append(row)
        return lines

    lines = sort(rows)
    if len(lines) > MOST_LINES:
        rows = [row for row in rows if ":" not in row["name"]]
        lines = sort(rows)
    if len(lines) > MOST_LINES and "token_budget" in others:
        budgets = distinct(rows, "token_budget")
        ends = {None, min(budgets), max(budgets)}
        lines = sort([row for row in rows if row["token_budget"] in ends])
    return lines
