"""A plot of times against what was swept."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rocketkv.bench.output import AXES, Record, distinct
from rocketkv.bench.timing import floor_of
from rocketkv.errors import InputError

PLOT_FORMATS = (".png", ".svg")


def check_plot(path: Path | None) -> None:
    """Refuse a plot that could not be drawn, before anything is measured.

    Raises:
        InputError: the name ends in no known format, its folder does not exist, or matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix not in PLOT_FORMATS:
        raise InputError(f"plot={str(path)!r} is no picture that can be drawn; end it in {' or '.join(PLOT_FORMATS)}.")
    if not path.parent.is_dir():
        raise InputError(f"plot={str(path)!r} lies in a folder that does not exist; make it first.")
    if find_spec("matplotlib") is None:
        raise InputError("a plot needs matplotlib, which is not installed; run `pip install rocketkv[plot]`.")


def save_plot(result: Record, path: Path) -> None:
    """Draw time, or for memory the peak, against what was swept, on logarithmic axes; floors are dashed."""
    from matplotlib.figure import Figure

    rows: Sequence[Record] = result["rows"]
    value, label = (
        ("peak_rss_bytes", "peak bytes") if result["benchmark"] == "memory" else ("median_ms", "milliseconds")
    )
    axis = next((name for name in AXES if len(distinct(rows, name)) > 1), "seq_len")
    others = [name for name in AXES if name != axis and len(distinct(rows, name)) > 1]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    plot = figure.add_subplot(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=label)
    colors: dict[tuple[object, ...], str] = {}  # a floor has the colour of what it is the floor of
    for line_label, line in _lines(rows, [*others, "path"]).items():
        points = sorted((row[axis], row[value]) for row in line if row[axis] is not None)
        if not points:  # the same for every value on the axis
            points = [(x, line[0][value]) for x in sorted(distinct(rows, axis))]
        is_floor = line[0]["name"].endswith("_floor")
        name = line[0]["name"] if is_floor else floor_of(line[0]["name"]) or line[0]["name"]
        group = (name, *(line[0][other] for other in others))
        color = colors.get(group) if is_floor else None
        (drawn,) = plot.plot(*zip(*points, strict=True), "--" if is_floor else "o-", label=line_label, color=color)
        colors.setdefault(group, drawn.get_color())
    plot.set_xticks(sorted(distinct(rows, axis)), [f"{x:,}" for x in sorted(distinct(rows, axis))], minor=False)
    plot.minorticks_off()
    plot.set_title(f"{result['benchmark']}, {result['model']}, {result['dtype']}")
    plot.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=150)


def _lines(rows: Sequence[Record], names: Sequence[str]) -> dict[str, list[Record]]:
    """Rows that belong to one line, by its label."""
    lines: dict[str, list[Record]] = {}
    for row in rows:
        parts = [str(row["name"])]
        for name in names:
            if row.get(name) is not None:
                parts.append(str(row[name]) if name == "path" else f"{name}={row[name]}")
        lines.setdefault(", ".join(parts), []).append(row)
    return lines
