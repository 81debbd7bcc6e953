"""The lines of a plot: which rows belong to one, and the labels at their ends."""

from collections.abc import Mapping, Sequence
from math import inf, log10
from typing import TYPE_CHECKING

from rocketkv.bench.output import AXES, Record, distinct
from rocketkv.bench.words import WORDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_GAP = 13.0  # points from the label of a line to the next one above it
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


def label_ends(plot: "Axes", x: float, ends: Sequence[tuple[float, str]], colors: Mapping[str, str]) -> None:
    """Write each label beside the end of its line at `x`, on a logarithmic axis, moved up where it would touch another.

    Args:
        plot: the panel, with its limits as they stay.
        x: where the lines end.
        ends: the value at the end of each line, and its label.
        colors: the colour of each label.
    """
    low, high = plot.get_ylim()
    points_per_decade = plot.bbox.height / plot.figure.dpi * 72 / log10(high / low)
    above = -inf
    for y, label in sorted(ends):
        place = points_per_decade * log10(y / low)
        above = max(place, above + LABEL_GAP)
        plot.annotate(
            label,
            (x, y),
            xytext=(8, above - place),
            textcoords="offset points",
            va="center",
            color=colors[label],
            annotation_clip=False,
        )
