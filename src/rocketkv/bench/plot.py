"""Plots of a measurement in a reader's words: lines with labels at their ends, and one message as the title."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rocketkv.bench.lines import lines_of, swept_axis
from rocketkv.bench.output import Record
from rocketkv.bench.words import ACROSS, PANELS, TIME, colors_of
from rocketkv.errors import InputError
from rocketkv.figures import label_ends, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def save_plot(result: Record, path: Path, title: str | None = None) -> None:
    """Draw what was measured against what was swept, on logarithmic axes; floors and parts of a step are left out.

    Args:
        result: what a command of `rocketkv bench` prints with `--json`.
        path: the picture's file, one of `PLOT_FORMATS`.
        title: the message of the picture; None names the model and the dtype.
    """
    from matplotlib.figure import Figure

    axis = swept_axis(result["rows"])
    panels = PANELS.get(result["benchmark"], TIME)
    lines = lines_of(result["rows"], axis)
    figure = Figure(figsize=(9.8 if len(panels) == 2 else 7.5, 3.6), layout="constrained")
    figure.suptitle(title or f"{result['model']}, {result['dtype']}", x=0.01, ha="left", fontweight="bold")
    plots = figure.subplots(1, len(panels), squeeze=False)[0]
    for plot, (value, (unit, label)) in zip(plots, panels.items(), strict=True):
        _draw(plot, lines, axis, value, unit)
        plot.set_title(label, loc="left", fontsize="medium")
    save_figure(figure, path)


def _draw(plot: "Axes", lines: dict[str, list[Record]], axis: str, value: str, unit: float) -> None:
    """Draw the lines in one panel, each with its label at its right end."""
    from matplotlib.ticker import LogLocator

    xs = sorted({row[axis] for line in lines.values() for row in line if row[axis] is not None})
    plot.set(xscale="log", yscale="log", xlabel=ACROSS[axis])
    colors = colors_of(lines)
    ends: list[tuple[float, float, str]] = []
    for label, line in lines.items():
        points = sorted((row[axis], row[value] / unit) for row in line if row[axis] is not None)
        if not points:  # the same for every value on the axis
            points = [(x, line[0][value] / unit) for x in xs]
        plot.plot(*zip(*points, strict=True), "o-", label=label, color=colors[label], markersize=4, linewidth=2)
        ends.append((xs[-1], points[-1][1], label))
    plot.set_xticks(xs, [f"{x:,}" for x in xs], minor=False, fontsize="small")
    low, high = plot.get_ylim()
    plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    plot.yaxis.set_major_formatter("{x:,g}")
    plot.minorticks_off()
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    label_ends(plot, ends, colors)
