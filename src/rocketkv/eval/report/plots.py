"""The report's plots, in colours that the colour-blind can tell apart, and with different markers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rocketkv.eval.report.results import FULL_CACHE, Results, layer_means, turn_scores
from rocketkv.eval.report.statistics import score_interval
from rocketkv.eval.report.words import words_of
from rocketkv.eval.run.methods import FULL, METHODS, Arm
from rocketkv.figures import label_ends

OKABE_ITO = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#D55E00")
COLORS = (*OKABE_ITO, "#8C564B", "#6E62B6")  # as many as there are methods
MARKERS = "osD^vPX*p"
NO_DATA = {"facecolor": "white", "edgecolor": "#bbbbbb", "hatch": "////"}
MAX_DEPTHS = 12  # a plot with more levels than these draws ten of them

Grid = NDArray[np.float64]


def draw_budgets(results: Results) -> Figure:
    """Draw the score against the budget: a line per method that has all tasks, and a dotted one for the full cache."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    plot = figure.add_subplot(xlabel="token budget", ylabel="score", xscale="log")
    lines: dict[str, dict[int, float]] = {method: {} for method in results.methods}
    for arm in results.arms:
        tasks = results.tasks(arm, results.cells)
        if len(tasks) == len(results.cells):
            for budget in results.budgets if arm == FULL_CACHE else [arm.token_budget or 0]:
                lines[arm.method][budget] = 100 * score_interval(tasks).value
    styles = {method: _style(method) for method, points in lines.items() if points}
    for method, style in styles.items():
        plot.plot(list(lines[method]), list(lines[method].values()), label=words_of(method), **style)
    _finish(plot, results.budgets)
    ends = [(*list(lines[method].items())[-1], words_of(method)) for method in styles]
    label_ends(plot, ends, {words_of(method): style["color"] for method, style in styles.items()})
    return figure


def draw_turns(results: Results) -> Figure:
    """Draw the score at each turn, in a panel per budget."""

    def line(arm: Arm) -> Mapping[int, float]:
        return {turn + 1: 100 * score for turn, score in turn_scores(results, arm).items()}

    return _lines(results, line, "turn", "score")


def draw_layers(results: Results, name: str, label: str) -> Figure:
    """Draw a figure by layer, the mean over texts, in a panel per budget."""

    def line(arm: Arm) -> Mapping[int, float]:
        return dict(enumerate(layer_means(results.at(arm), name)))

    return _lines(results, line, "layer", label)


def draw_depths(results: Results, task: str) -> Figure:
    """Draw the score by length and depth of one task, in a row of panels per budget."""
    cells = [cell for cell in results.cells if cell.task == task]
    depths = sorted({record["depth"] for arm in results.arms for record in results.at(arm, cells)})
    if len(depths) > MAX_DEPTHS:
        depths = [step / 10 for step in range(10)]

    def grid(arm: Arm) -> Grid:
        sums, counts = np.zeros((2, len(depths), len(cells)))
        for column, cell in enumerate(cells):
            for record in results.at(arm, [cell]):
                row = int(np.searchsorted(depths, record["depth"], side="right")) - 1
                sums[row, column] += record["scores"]["score"]
                counts[row, column] += 1
        return 100 * np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)

    figure, plot = _heat_maps(results, grid, "score", Normalize(0, 100))
    every = max(1, len(depths) // 5)
    plot.set_yticks(range(0, len(depths), every), [f"{depth:.0%}" for depth in depths[::every]])
    plot.set_xticks(range(len(cells)), [f"{cell.length or 0:,}" for cell in cells])
    figure.supylabel("depth of the answer", fontsize="small")
    figure.supxlabel("length of the text, tokens", fontsize="small")
    return figure


def draw_kept(results: Results) -> Figure | None:
    """Draw which part of the text each layer keeps: layers down, positions across; None if no method evicts."""

    def grid(arm: Arm) -> Grid:
        shares = layer_means(results.at(arm), "kept")
        return 100 * shares if (shares < 1).any() else np.array([])  # a method that keeps every token needs no plot

    if not any(grid(arm).size for arm in results.arms):
        return None
    figure, plot = _heat_maps(results, grid, "kept, %", LogNorm(1, 100, clip=True))
    plot.set_xticks([])
    figure.supxlabel("position in the text, from start to end", fontsize="small")
    figure.supylabel("layer", fontsize="small")
    return figure


def _lines(results: Results, line: Callable[[Arm], Mapping[int, float]], x: str, y: str) -> Figure:
    """Draw a panel per budget and a line per method."""
    budgets = results.rows
    figure = Figure(figsize=(2.6 * len(budgets) + 2, 3.2), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for plot, budget in zip(panels, budgets, strict=True):
        ticks: set[int] = set()
        for arm in results.arms_at(budget):
            points = line(arm)
            ticks |= set(points)
            if points:
                style = _style(arm.method) | {"markevery": max(1, len(points) // 6)}
                plot.plot(list(points), list(points.values()), label=words_of(arm.method), **style)
        plot.set_title(_budget(budget), fontsize="medium")
        plot.set_xlabel(x)
        _finish(plot, sorted(ticks)[:: max(1, len(ticks) // 6)])
    panels[0].set_ylabel(y)
    _legend(figure)
    return figure


def _heat_maps(results: Results, grid: Callable[[Arm], Grid], label: str, norm: Normalize) -> tuple[Figure, Axes]:
    """Draw panels of one colour scale: a row per budget, a column per method that has any data."""
    budgets = results.rows
    grids = {(budget, arm.method): grid(arm) for budget in budgets for arm in results.arms_at(budget)}
    grids = {place: values for place, values in grids.items() if not np.isnan(values).all()}
    methods = [method for method in results.methods if any((budget, method) in grids for budget in budgets)]
    figure = Figure(figsize=(1.15 * len(methods) + 1.6, 1.4 * len(budgets) + 0.9), layout="constrained")
    panels = figure.subplots(len(budgets), len(methods), squeeze=False, sharex=True, sharey=True)
    for row, budget in zip(panels, budgets, strict=True):
        for plot, method in zip(row, methods, strict=True):
            plot.patch.set(**NO_DATA)
            plot.tick_params(labelsize="x-small")
            plot.tick_params(axis="x", rotation=90)
            if (budget, method) in grids:
                image = plot.imshow(
                    grids[budget, method], cmap="viridis", norm=norm, aspect="auto", interpolation="nearest"
                )
        row[-1].annotate(
            _budget(budget), (1.04, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize="small"
        )
    for plot, method in zip(panels[0], methods, strict=True):
        plot.set_title(words_of(method).replace(", ", "\n").replace(" (", "\n("), fontsize="small")
    bar = figure.colorbar(image, ax=panels, shrink=0.8, format="{x:.0f}")
    bar.set_label(f"{label} (hatched: no data)", fontsize="small")
    bar.ax.tick_params(labelsize="x-small")
    return figure, panels[0, 0]


def _budget(budget: int | None) -> str:
    return "" if budget is None else f"t = {budget}"


def _finish(plot: Axes, ticks: Sequence[int]) -> None:
    """Draw the axes, grid and titles that all line plots share."""
    plot.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    plot.minorticks_off()
    plot.grid(alpha=0.3)
    plot.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    """Draw one legend for all panels, with each method once."""
    entries: dict[str, Artist] = {}
    for plot in figure.axes:
        handles, labels = plot.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries, fontsize="small", loc="outside right upper", frameon=False)


def _style(method: str) -> dict[str, Any]:
    """Return a method's style, the same in all plots; methods beyond the palette have dashes, options have dots."""
    if method == FULL:
        return {"color": "#777777", "linestyle": ":", "linewidth": 2, "zorder": 3}
    name, _, options = method.partition(":")
    place = [name for name in METHODS if name != FULL].index(name) + crc32(options.encode())
    dashes, color = divmod(place, len(COLORS))
    return {
        "color": COLORS[color],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": ":" if options else "-" if dashes == 0 else "--",
        "markersize": 4,
        "linewidth": 1.3,
    }
