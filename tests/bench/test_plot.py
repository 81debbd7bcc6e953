"""Tests of the plots of measurements: what they draw, and that their words are a reader's."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rocketkv.bench import timing
from rocketkv.bench.lines import MOST_LINES
from rocketkv.bench.plot import save_plot
from rocketkv.cli import app

ROOT = Path(__file__).parents[2]
RECORDS = sorted(ROOT.joinpath("benchmarks", "results").glob("*-by-*.json"))


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of every figure that is saved from here on."""
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn: list[Any] = []
    saved = figure_class.savefig
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: (drawn.extend(self.axes), saved(self, *a, **k)))
    return drawn


def test_a_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rocketkv.bench.plot.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "prefill", "--plot", "a.png"])
    assert "a plot needs matplotlib, which is not installed; run `pip install rocketkv[plot]`." in result.stderr


@pytest.mark.parametrize("axis", ["seq_len", "token_budget", "batch"])
def test_a_sweep_is_drawn(axis: str, tmp_path: Path, panels: list[Any]) -> None:
    rows = [
        timing.Row(name, [1.0, 2.0], 100, **{"seq_len": 512, "token_budget": 64, "batch": 1, axis: value}).record()
        for name in ("sparse", "sparse_floor")
        for value in (128, 256, 512)
    ]
    flat = timing.Row("dense", [3.0], 100, 512, None, 1).record()
    save_plot({"benchmark": "attention", "model": "m", "dtype": "bfloat16", "rows": [*rows, flat]}, tmp_path / "a.svg")
    (plot,) = panels
    lines = {line.get_label(): line for line in plot.lines}
    assert set(lines) == {"RocketKV", "all tokens, our kernels"}  # the floor stays in the table
    drawn = [(int(x), y) for x, y in lines["RocketKV"].get_xydata()]
    assert drawn == [(row[axis], row["median_ms"]) for row in rows if row["name"] == "sparse"]
    dense = lines["all tokens, our kernels"]
    assert set(dense.get_ydata()) == {flat["median_ms"]}
    assert len(dense.get_xdata()) == (3 if axis == "token_budget" else 1)  # it is the same for every budget


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_committed_results_are_drawn_in_words(record: Path, tmp_path: Path, panels: list[Any]) -> None:
    save_plot(json.loads(record.read_text(encoding="utf-8")), tmp_path / "a.svg", "The message")
    picture = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert ">The message<" in picture
    assert "prefers-color-scheme: dark" in picture
    for panel in panels:
        labels = [text.get_text() for text in panel.texts]
        assert sorted(labels) == sorted({str(line.get_label()) for line in panel.lines})
        assert 2 <= len(labels) <= MOST_LINES
        assert not [label for label in labels if "_" in label or ":" in label]  # no names of rows
        boxes = sorted((text.get_window_extent() for text in panel.texts), key=lambda box: box.y0)
        assert all(upper.y0 > lower.y0 + 0.7 * lower.height for lower, upper in pairwise(boxes))


def test_a_png_is_drawn_as_well(tmp_path: Path, panels: list[Any]) -> None:
    save_plot(json.loads(RECORDS[0].read_text(encoding="utf-8")), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
