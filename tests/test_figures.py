"""What an SVG file of a figure says to a reader: a title for each point, and labels that do not touch."""

from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from rocketkv.figures import LABEL_GAP, SVG, label_ends, save_figure


def two_lines() -> Figure:
    figure = Figure()
    plot = figure.add_subplot(xlabel="token budget", ylabel="score", xscale="log")
    plot.plot([128, 256, 512], [79.6789, 81, 1234.5], "o-", label="RocketKV")
    plot.plot([128, 512], [83, 83], ":", label="full cache")
    return figure


def test_each_marker_says_its_value_where_it_is(tmp_path: Path) -> None:
    save_figure(two_lines(), tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    points = root.findall(f".//{SVG}circle")
    titles = [point.findtext(f"{SVG}title") for point in points]
    assert titles == [
        "RocketKV\nscore: 79.7\ntoken budget: 128",
        "RocketKV\nscore: 81\ntoken budget: 256",
        "RocketKV\nscore: 1,234\ntoken budget: 512",
    ]
    markers = {(use.get("x"), use.get("y")) for use in root.findall(f".//{SVG}use")}
    assert {(point.get("cx"), point.get("cy")) for point in points} <= markers
    assert ">token budget<" in (tmp_path / "a.svg").read_text(encoding="utf-8")  # texts are texts


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        save_figure(two_lines(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_labels_of_lines_that_end_together_stand_apart_around_them(scale: str) -> None:
    figure = Figure()
    plot = figure.add_subplot(yscale=scale, ylim=(1, 100))
    ends = [(1.0, y, f"{y:g}") for y in (51, 50, 2, 49)]
    label_ends(plot, ends, dict.fromkeys(("51", "50", "2", "49"), "#000000"))
    texts: dict[str, Any] = {text.get_text(): text for text in plot.texts}
    at = {name: plot.transData.transform(text.xy)[1] / 100 * 72 + text.xyann[1] for name, text in texts.items()}
    assert all(above - below > LABEL_GAP - 1e-9 for below, above in pairwise(sorted(at.values())))
    assert sorted(at, key=lambda name: at[name]) == ["2", "49", "50", "51"]
    assert texts["2"].xyann[1] == pytest.approx(0)  # what touches no other stays beside its line
    assert texts["50"].xyann[1] == pytest.approx(0, abs=1)
