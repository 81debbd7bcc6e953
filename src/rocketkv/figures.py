"""Writes Matplotlib's figures: lines with labels at their ends, and SVG files with the value of each point under it."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, cast
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

SVG = "{http://www.w3.org/2000/svg}"
LABEL_GAP = 13.0  # typographic points from the label of a line to the next one above it
POINT_RADIUS = "7"  # typographic points around a marker in which its tooltip shows
# A reader with a dark screen gets the picture inverted, its colours kept: a legible card on a page of any colour. The
# point under the pointer is circled, and the browser itself shows its title, without a script.
STYLE = """
svg { max-width: 100%; height: auto }
@media (prefers-color-scheme: dark) { svg { filter: invert(.93) hue-rotate(180deg) } }
.point { fill: transparent }
.point:hover { stroke: #777777 }
"""


def label_ends(plot: "Axes", ends: Sequence[tuple[float, float, str]], colors: Mapping[str, str]) -> None:
    """Write each label beside the end of its line, moved up or down where it would touch another.

    Args:
        plot: the panel, with its limits and scales as they stay.
        ends: where each line ends, across and up, and its label.
        colors: the colour of each label.
    """
    ends = sorted(ends, key=lambda end: end[1])
    places = [plot.transData.transform((x, y))[1] / plot.figure.dpi * 72 for x, y, _ in ends]
    raised = list(accumulate(places, lambda below, place: max(below + LABEL_GAP, place)))
    lowered = list(accumulate(reversed(places), lambda above, place: min(above - LABEL_GAP, place)))
    for (x, y, label), place, high, low in zip(ends, places, raised, reversed(lowered), strict=True):
        plot.annotate(
            label,
            (x, y),
            xytext=(8, (high + low) / 2 - place),
            textcoords="offset points",
            va="center",
            color=colors[label],
            annotation_clip=False,
        )


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as the picture that the ending of the file's name asks for.

    An SVG has the same bytes for the same figure, its texts are texts, and each marker of a line has a tooltip: the
    line's label, the value, and the place on the horizontal axis.

    Args:
        figure: its panels name their values in the label of the vertical axis, or else in the title at the left.
        path: the file to write; its name ends in .svg or in what else Matplotlib draws.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context

    if path.suffix != ".svg":
        figure.savefig(path, dpi=150)
        return
    tooltips = {}
    for number, (plot, line) in enumerate((axes, line) for axes in figure.axes for line in axes.lines):
        line.set_gid(f"line-{number}")
        tooltips[f"line-{number}"] = _tooltips(plot, line)
    with rc_context({"svg.hashsalt": "rocketkv", "svg.fonttype": "none"}):
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    ElementTree.register_namespace("", SVG.strip("{}"))
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    picture = ElementTree.parse(path)
    for group in [group for group in picture.iter(f"{SVG}g") if group.get("id") in tooltips]:
        for marker, text in zip(group.findall(f".//{SVG}use"), tooltips[group.get("id", "")], strict=True):
            place = {"cx": marker.get("x", ""), "cy": marker.get("y", ""), "r": POINT_RADIUS}
            circle = ElementTree.SubElement(group, f"{SVG}circle", {"class": "point", **place})
            ElementTree.SubElement(circle, f"{SVG}title").text = text
    style = ElementTree.Element(f"{SVG}style")
    style.text = STYLE
    picture.getroot().insert(0, style)
    picture.write(path, encoding="utf-8", xml_declaration=True)


def _tooltips(plot: "Axes", line: "Line2D") -> list[str]:
    """Return the text for each marker of a line."""
    if line.get_marker() == "None":
        return []
    unit = plot.get_ylabel() or plot.get_title(loc="left")
    points = list(cast("Iterable[tuple[float, float]]", line.get_xydata()))[:: line.get_markevery() or 1]
    return [f"{line.get_label()}\n{unit}: {_number(y)}\n{plot.get_xlabel()}: {_number(x)}" for x, y in points]


def _number(value: float) -> str:
    """Return a number in three digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
