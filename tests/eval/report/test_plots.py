"""Tests of what the report's plots draw."""

from typing import Any

import numpy as np

from eval_records import BINS, LAYERS, answers, record, rows_of
from rocketkv.eval.report import plots, tables
from rocketkv.eval.report.results import Results
from rocketkv.eval.report.words import NAMES, words_of
from rocketkv.eval.run.methods import METHODS


def values_drawn(figure: Any) -> list[np.ndarray]:
    return [np.ma.filled(plot.images[0].get_array(), np.nan) for plot in figure.axes if plot.images]


def test_depths_are_drawn_where_they_are() -> None:
    records = [
        *(record("full", None, f"{d}", d == 0.5, depth=d) for d in (0, 0.5, 1)),
        *(record("full", None, f"{d}", 1, depth=d, length=2048) for d in (0, 1)),
        *(record("quest", 64, f"{d}-{n}", n, depth=d) for d in (0, 1) for n in (0, 1)),
    ]
    full, quest = values_drawn(plots.draw_depths(Results(records), "passkey"))
    np.testing.assert_array_equal(full, [[0, 100], [100, np.nan], [0, 100]])  # depths down, lengths across
    np.testing.assert_array_equal(quest, [[50, np.nan], [np.nan, np.nan], [50, np.nan]])


def test_many_depths_are_drawn_in_ten_steps() -> None:
    depths = np.linspace(0, 1, 30)
    records = [record("full", None, str(d), d > 0.95, depth=float(d)) for d in depths]
    [full] = values_drawn(plots.draw_depths(Results(records), "passkey"))
    expected = [
        100 * np.mean(depths[(depths >= step / 10) & (depths < (step + 1) / 10 + (step == 9))] > 0.95)
        for step in range(10)
    ]
    np.testing.assert_allclose(full[:, 0], expected)
    assert full[9, 0] > full[8, 0] == 0


def test_lines_hold_the_scores_and_incomplete_methods_have_no_point() -> None:
    records = [
        *answers("full", None, [1, 1]), *answers("full", None, [1, 0], task="other"),
        *answers("quest", 64, [1, 1]),
        *answers("quest", 128, [1, 1]), *answers("quest", 128, [0, 0], task="other"),
    ]  # fmt: skip
    [plot] = plots.draw_budgets(Results(records)).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in plot.lines}
    assert lines == {"full cache": [[64, 75], [128, 75]], "Quest": [[128, 50]]}


def test_plots_name_methods_in_words() -> None:
    assert set(NAMES) == set(METHODS)
    assert words_of("rocketkv:kv_dtype=int8:window_size=16") == "RocketKV, 8 bits, window_size=16"


def test_snapkv_is_counted_per_query_head_as_well() -> None:
    records = [*answers("full", None, [1, 1]), *answers("snapkv", 64, [1, 0]), *answers("quest", 64, [1, 0])]
    rows = {row["method"]: row for row in rows_of(tables.suite_table(Results(records)))}
    assert list(rows) == ["full", "snapkv", "snapkv, counted per query head", "quest"]
    counted = rows["snapkv, counted per query head"]
    assert (counted["t"], counted["score"], counted["read / step"], counted["held"]) == (
        "64",
        "",
        "3.0 MiB",
        "24.0 MiB",
    )
    assert rows["snapkv"]["read / step"] == "1.0 MiB"


def test_every_method_has_a_style_of_its_own() -> None:
    styles = [plots._style(method) for method in [*METHODS, "rocketkv:window_size=16", "rocketkv:window_size=64"]]
    assert len({(style["color"], style.get("marker"), style["linestyle"]) for style in styles}) == len(styles)


def test_only_what_evicts_is_drawn_as_kept() -> None:
    some = np.linspace(0.1, 1, LAYERS * BINS).reshape(LAYERS, BINS)
    records = [record("quest", 64, "a", 1, kept=np.ones((LAYERS, BINS)).tolist())]
    assert plots.draw_kept(Results(records)) is None
    records += [
        record("snapkv", 64, "a", 1, kept=some.tolist()),
        record("snapkv", 64, "b", 1, kept=(some / 2).tolist()),
    ]
    [kept] = values_drawn(plots.draw_kept(Results(records)))
    np.testing.assert_allclose(kept, 75 * some)
