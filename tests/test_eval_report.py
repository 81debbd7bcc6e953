"""The report: its statistics against known values, its tables against records written out by hand, its files."""

import base64
import gzip
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt

from rocketkv.errors import InputError
from rocketkv.eval import plots, report, tables
from rocketkv.eval.markdown import escape
from rocketkv.eval.methods import METHODS, Arm
from rocketkv.eval.results import FULL_CACHE, Cell, Results, layer_means
from rocketkv.eval.runs import read_runs
from rocketkv.eval.statistics import mean_interval, ratio_interval, score_interval, wilson

LAYERS, BINS = 3, 32
MIB = 2**20


def record(method: str, budget: int | None, sample: str, score: float, **fields: Any) -> dict[str, Any]:
    return {
        "suite": "niah", "task": "passkey", "id": sample, "length": 1024, "depth": None, "turn": 0, "turns": 1,
        "method": method, "token_budget": budget, "prediction": "", "scores": {"score": score}, "agrees": None,
        "prompt": "", "prompt_tokens": 1000, "new_tokens": 8, "read_bytes": 4 * MIB if budget is None else MIB,
        "kv_bytes": 8 * MIB, "group_size": 3, "prefill_s": 3.0, "decode_s": 1.0, "rows": 3,
    } | fields  # fmt: skip


def answers(method: str, budget: int | None, scores: Sequence[float], **fields: Any) -> list[dict[str, Any]]:
    return [record(method, budget, str(number), score, **fields) for number, score in enumerate(scores)]


def write_run(
    folder: Path, records: Sequence[dict[str, Any]], faults: Sequence[dict[str, str]] = (), **facts: Any
) -> Path:
    folder.mkdir()
    facts = {"model": "smollm2", "dtype": "float32", "versions": {"torch": "2.13"}} | facts
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    for name, lines in (("records", records), ("faults", faults)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def rows_of(table: str) -> list[dict[str, str]]:
    """A Markdown table's rows by the names in its head; of equal names the first."""
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return [dict(zip(reversed(header), reversed(row), strict=True)) for row in rows]


def array(*values: float) -> np.ndarray:
    return np.array(values)


# Statistics


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    interval = wilson(successes, trials)
    assert interval.value == successes / trials
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_scores_of_0_and_1_get_wilson_and_others_a_bootstrap() -> None:
    binary = array(1, 1, 0, 1)
    assert score_interval([binary, binary]) == wilson(6, 8)
    graded = score_interval([binary, array(0.5, 0.75, 1, 0)])
    assert graded.value == pytest.approx((0.75 + 0.5625) / 2)
    assert graded.low < graded.value < graded.high
    assert score_interval([binary, array(1, 1)]).value == pytest.approx((0.75 + 1) / 2)  # tasks count the same


def test_bootstrap_is_as_wide_as_theory_says_and_always_the_same() -> None:
    values = np.random.default_rng(1).normal(0.3, 0.2, 400)
    interval = mean_interval([values])
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert mean_interval([values]) == interval


def test_bootstrap_draws_each_task_on_its_own() -> None:
    values = np.random.default_rng(2).normal(0, 1, 100)
    one, two = mean_interval([values]), mean_interval([values, values])
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(1 / math.sqrt(2), rel=0.1)


def test_bootstrap_covers_the_truth_as_often_as_it_claims() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        interval = mean_interval([generator.binomial(1, 0.6, 50).astype(float), generator.random(50)])
        hits += interval.low <= (0.6 + 0.5) / 2 <= interval.high
    assert 0.91 <= hits / 300 <= 0.98


def test_ratio_is_paired_by_sample() -> None:
    full = np.random.default_rng(4).random(60)
    exact = ratio_interval([0.9 * full], [full])
    assert (exact.value, exact.low, exact.high) == pytest.approx((0.9, 0.9, 0.9))
    shuffled = ratio_interval([0.9 * full[::-1]], [full])
    assert shuffled.value == pytest.approx(0.9)
    assert shuffled.high - shuffled.low > 0.1


def test_one_sample_has_no_interval() -> None:
    assert not mean_interval([array(0.5)]).known
    assert not ratio_interval([array(0.5), array(1, 0)], [array(1.0), array(1, 1)]).known
    assert score_interval([array(1.0)]).known  # a share has one by Wilson


def test_ratio_goes_round_resamples_without_any_full_answer() -> None:
    interval = ratio_interval([array(1, 0, 0)], [array(1, 1, 0)])
    assert interval.value == 0.5
    assert 0 <= interval.low <= interval.high <= 1


# Results


def test_a_sample_of_several_turns_counts_once() -> None:
    cell = Cell("niah", "passkey", 1024)
    turns = [record("full", None, "a", score, turn=turn) for turn, score in enumerate((1, 0, 0))]
    results = Results([*turns, record("full", None, "b", 1)])
    assert results.scores(FULL_CACHE, cell) == {"a": pytest.approx(1 / 3), "b": 1}
    assert results.multi_turn_cells == [cell]
    assert tables.turn_table(results).splitlines()[2] == "| full |  | 100.0 | 0.0 | 0.0 |"


def test_methods_are_compared_on_the_samples_that_both_have() -> None:
    ours, full = Arm("quest", 64), FULL_CACHE
    results = Results([*answers("full", None, [1, 1, 0, 1]), *answers("quest", 64, [0, 1])])
    assert [values.tolist() for (values,) in results.paired(ours, full, results.cells)] == [[0, 1], [1, 1]]
    assert tables.difference(results, ours, full).startswith("-50.0 [")
    assert tables.difference(results, full, Arm("snapkv", 64)) == "no data"


def test_a_difference_beyond_noise_is_bold() -> None:
    results = Results([*answers("full", None, [1] * 30), *answers("quest", 64, [0, 1] * 15)])
    assert re.fullmatch(
        r"\*\*-50\.0 \[-6\d\.\d, -3\d\.\d\]\*\*", tables.difference(results, Arm("quest", 64), FULL_CACHE)
    )
    alike = Results([*answers("full", None, [1, 0] * 15), *answers("quest", 64, [0, 1] * 15)])
    assert tables.difference(alike, Arm("quest", 64), FULL_CACHE).startswith("+0.0 [")


def test_suite_table() -> None:
    full = answers("full", None, [1, 1, 1, 0], agrees=True)
    ours = [*answers("rocketkv", 64, [1, 1, 0], agrees=True), record("rocketkv", 64, "3", 0, agrees=False)]
    other_task = answers("full", None, [1, 1], task="other", read_bytes=MIB)
    head, first, second = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in tables.suite_table(Results([*full, *ours, *other_task])).splitlines()
        if "---" not in line
    ]
    assert head[-4:] == ["read / step", "of full", "held", "of full"]
    assert first[0] == "full"
    assert first[2].startswith("87.5 [")  # the mean of 75 and 100
    assert first[5] == "6"
    assert second[:2] == ["rocketkv", "64"]
    assert second[2].startswith("50.0 [")
    assert second[3].startswith("-25.0 [")
    assert second[4:] == ["75.0 %", "4 (1 of 2 tasks)", "1.0 MiB", "25.0 %", "8.0 MiB", "100.0 %"]


def test_task_table_says_where_there_is_no_data_and_gives_every_figure() -> None:
    records = [
        *(line | {"scores": {"score": 0.5, "released": 0.25}} for line in answers("full", None, [1, 0])),
        *answers("full", None, [1] * 3, length=2048),
        *answers("quest", 64, [0] * 2, length=2048),
        *answers("snapkv", 128, [1] * 2),
    ]
    rows = rows_of(tables.task_table(Results(records), 64))
    assert [row["task"] for row in rows] == ["passkey at 1,024", "passkey at 1,024, released", "passkey at 2,048"]
    assert [row["n"] for row in rows] == ["2", "2", "2-3"]
    assert [row["full"][:5] for row in rows] == ["50.0 ", "25.0 ", "100.0"]
    assert [row["quest"] for row in rows] == ["no data", "no data", "0.0 [0.0, 65.8]"]
    assert "snapkv" not in rows[0]


def test_what_is_kept_of_full_cache_on_the_tasks_it_solves() -> None:
    records = [
        *answers("full", None, [1, 1, 1, 0.2]),  # 0.8
        *answers("full", None, [0.6, 0.6], task="half"),  # 0.6
        *answers("full", None, [0.5, 0.5], task="hard"),  # not above 0.5
        *answers("rocketkv", 256, [1, 1, 0.6, 0.2]),  # 0.7
        *answers("rocketkv", 256, [0.6, 0.6], task="half"),
        *answers("rocketkv", 256, [0, 0], task="hard"),
        *answers("quest", 256, [0.4] * 4),
        *answers("rocketkv", 512, [1, 1, 0.4, 0.2]),  # 0.65
        *answers("rocketkv", 512, [0.6, 0.6], task="half"),
    ]
    results = Results(records)
    cells = results.solved_by_full_cache(0.5)
    assert [cell.task for cell in cells] == ["passkey", "half"]
    quest, ours, more = rows_of(tables.kept_score_table(results, cells))
    assert (quest["tasks"], quest["bar"]) == ("1 of 2", "90 %: tasks missing")
    assert (ours["tasks"], ours["n per task"], ours["average"], ours["full cache's"]) == (
        "2 of 2",
        "2-4",
        "65.0",
        "70.0",
    )
    assert ours["kept, %"].startswith("92.9 [")  # 0.65 / 0.7
    assert ours["mean of the tasks' %"] == "93.8"  # of 0.7 / 0.8 and 1
    assert ours["bar"] == "90 %: reached"
    assert more["kept, %"].startswith("89.3 [")
    assert more["bar"] == "95 %: missed"


def test_pairs_stand_once_and_budgets_apart() -> None:
    records = [
        *answers("full", None, [1, 1]), *answers("quest", 64, [1, 0]), *answers("rocketkv", 64, [1, 1]),
        *answers("rocketkv", 128, [0, 0]),
    ]  # fmt: skip
    results = Results(records)
    quest, rocketkv = tables.pair_table(results, 64, results.cells).splitlines()[2:]
    assert re.fullmatch(r"\| quest \| -50\.0 \[.*\] \|  \|", quest)
    assert re.fullmatch(r"\| rocketkv \| \+0\.0 \[.*\] \| \+50\.0 \[.*\] \|", rocketkv)


def test_one_prefill_for_all_saves_all_but_one() -> None:
    records = [record(method, budget, "a", 1) for method, budget in (("full", None), ("quest", 64), ("quest", 128))]
    [row] = rows_of(tables.prefill_table(Results(records)))
    assert list(row.values()) == ["6", "9", "3", "niah"]  # of 3 rows that share a prefill of 3 s


# Pictures


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
    assert lines == {"full": [[64, 75], [128, 75]], "quest": [[128, 50]]}


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


# Files


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two runs: planted facts, and questions in turn with a fault; full cache, two methods, two budgets."""
    generator = np.random.default_rng(0)
    variants = [("full", None), *((method, budget) for budget in (64, 256) for method in ("quest", "rocketkv"))]
    facts, turns, fidelity = [], [], []
    for method, budget in variants:
        share = 0.9 if budget is None else 0.5 + budget / 1000
        for number in range(20):
            score = float(generator.random() < share)
            facts.append(record(method, budget, str(number), score, depth=number % 10 / 9))
            graded = [float(generator.random() * share) for _ in range(3)]
            turns += [
                record(method, budget, str(number), one, suite="qa", task="turns", turn=turn, turns=3)
                for turn, one in enumerate(graded)
            ]
        layers = generator.random((LAYERS, BINS)).tolist()
        lists = (
            {} if budget is None else {"recall": [share] * LAYERS, "output_error": [1 - share] * LAYERS, "kept": layers}
        )
        figures = {"agreement": share, "kl": 0.1, "perplexity": 12.5} | lists
        fidelity.append(record(method, budget, "novel", 0, suite="fidelity", task="novel") | figures)
    fault = {"source": "rows.jsonl, line 3", "reason": "no answers | <b>give</b> *one*"}
    return [
        write_run(tmp_path / "facts", [*facts, *fidelity], commands=["eval run --suite niah", "eval run --shard 2/2"]),
        write_run(tmp_path / "turns", turns, faults=[fault], commands=["eval run --suite qa"]),
    ]


class Reader(HTMLParser):
    """Collects what a page refers to and says, and sees that its tags match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_report_is_whole(folders: list[Path], tmp_path: Path) -> None:
    written = report.write_report(folders, tmp_path / "out")
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    markdown, html, *pictures = written
    assert (markdown.name, html.name) == ("report.md", "report.html")
    assert [path.stem for path in pictures] == [
        "niah-budgets", "niah-passkey-depths", "qa-several-turns-budgets", "qa-several-turns-by-turn",
        "fidelity-recall-1024",
        "fidelity-output-error-1024", "fidelity-kept-1024",
    ]  # fmt: skip
    text = markdown.read_text(encoding="utf-8")
    assert re.findall(r"!\[.*\]\((.*)\)", text) == [path.name for path in pictures]
    for path in pictures:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    page = Reader(html.read_text(encoding="utf-8"))
    assert page.open == []
    embedded = [base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")) for source in page.sources]
    assert embedded == [path.read_bytes() for path in pictures]  # all of them, and nothing from elsewhere
    for words in (
        "smollm2",
        "eval run --suite niah; eval run --shard 2/2",
        "no answers | <b>give</b> *one*",
        "rows.jsonl, line 3",
    ):
        assert words in "".join(page.words)
    assert re.findall(r"^## .*", text, re.MULTILINE) == [
        "## What was run",
        "## Average over the tasks where the full cache scores above 50",
        "## niah",
        "## qa, several turns",
        "## Fidelity",
        "## One prefill for all methods",
        "## Faults",
        "## How to read it",
    ]
    assert "| 1,024 | rocketkv | 64 | 1 | 56.4 % | 0.1000 | 12.50 | 56.4 % | 43.6 % |" in text
    assert "| 1,024 | full |  | 1 | 90.0 % | 0.1000 | 12.50 |  |  | 4.0 MiB | 8.0 MiB |" in text
    assert "nan" not in text


def test_report_is_the_same_to_the_byte(folders: list[Path], tmp_path: Path) -> None:
    once, again = (report.write_report(folders, tmp_path / name) for name in ("once", "again"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_report_without_full_cache_and_of_one_turn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", answers("quest", 64, [1, 0, 1]))
    text = report.write_report([folder], tmp_path / "out")[0].read_text(encoding="utf-8")
    assert "No data: the full cache was not run." in text
    assert "| quest | 64 | 66.7 [20.8, 93.9] | no data | no data | 3 | 1.0 MiB | no data | 8.0 MiB | no data |" in text
    assert "By turn" not in text
    assert "Fidelity" not in text
    assert "nan" not in text


def test_report_of_nothing_yet(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    text = report.write_report([folder], tmp_path / "out")[0].read_text(encoding="utf-8")
    assert "| model | smollm2 |" in text
    assert "No answers yet." in text


def test_a_torn_line_and_half_an_answer_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", answers("quest", 64, [1, 0]))
    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record("quest", 64, "halved", 1, turns=2)) + '\n{"suite": "ni')
    [run] = read_runs([folder])
    assert [one["id"] for one in run.records] == ["0", "1"]


def test_shards_and_modes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", answers("quest", 64, [1]), mode="multi_request")
    (folder / "records.jsonl").rename(folder / "records-1-of-2.jsonl")
    second = json.dumps(record("quest", 64, "another", 0)) + "\n"
    (folder / "records-2-of-2.jsonl").write_text(second, encoding="utf-8")
    [run] = read_runs([folder])
    assert [(one["suite"], one["id"]) for one in run.records] == [
        ("niah (multi request)", "0"),
        ("niah (multi request)", "another"),
    ]


def test_packed_records_are_read_like_others(tmp_path: Path) -> None:
    records = [*answers("full", None, [1, 1]), *answers("quest", 64, [1, 0])]
    plain, packed = write_run(tmp_path / "run", records), write_run(tmp_path / "packed", [])
    (packed / "records.jsonl.gz").write_bytes(gzip.compress((plain / "records.jsonl").read_bytes()))
    (packed / "records.jsonl").unlink()
    assert read_runs([packed])[0].records == read_runs([plain])[0].records
    (packed / "records.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"records.jsonl.gz cannot be read \(Not a gzipped file"):
        read_runs([packed])


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", answers("quest", 64, [1]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no run\.json"):
        read_runs([good, tmp_path / "empty"])
    with pytest.raises(InputError, match=r"good and copy both hold niah, passkey, 0, quest"):
        read_runs([good, write_run(tmp_path / "copy", answers("quest", 64, [1]))])
    with pytest.raises(InputError, match=r"differ in model \(other, smollm2\)"):
        read_runs([good, write_run(tmp_path / "other", answers("snapkv", 64, [1]), model="other")])
    broken = write_run(tmp_path / "broken", [])
    (broken / "records.jsonl").write_text("{}{}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"records\.jsonl, line 1 is no record"):
        read_runs([broken])
    with pytest.raises(InputError, match="cannot be written"):
        report.write_report([good], good / "run.json")


FIELDS = record("quest", 64, "0", 1) | {"kl": 0.1, "output_error": [0.1] * LAYERS, "kept": [[0.1] * BINS] * LAYERS}
DAMAGED = {
    **{name: [3, None, [], {}] for name in ("suite", "task", "id", "method", "prediction", "prompt")},
    **{name: [2.5, None, "x", True, -1, 10**30] for name in ("turn", "turns", "prompt_tokens", "kv_bytes", "rows")},
    **{name: ["x", [], True, -1] for name in ("length", "token_budget", "read_bytes")},
    **{name: ["x", None, math.nan, math.inf, 10**400] for name in ("prefill_s", "decode_s")},
    "depth": ["x", [0.5], math.nan],
    "scores": [3, None, [], {}, {"other": 1}, {"score": "1"}, {"score": None}, {"score": math.nan}, {"score": True}],
    "agrees": ["yes", 1],
    "kl": ["x", [0.1]],
    "output_error": [0.1, ["x"], [[0.1]]],
    "kept": [[0.1], [[0.1], [0.1, 0.2]]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in DAMAGED.items() for value in values])
def test_a_damaged_field_is_named(tmp_path: Path, name: str, value: Any) -> None:
    folder = write_run(tmp_path / "run", [FIELDS, FIELDS | {"id": "1", name: value}])
    with pytest.raises(InputError, match=rf"records\.jsonl, line 2 is no record of an evaluation \({name}="):
        read_runs([folder])


@pytest.mark.parametrize("name", list(record("quest", 64, "0", 1)))
def test_a_missing_field_is_no_record(tmp_path: Path, name: str) -> None:
    lacking = {other: value for other, value in FIELDS.items() if other != name}
    with pytest.raises(InputError, match="line 1 is no record of an evaluation"):
        read_runs([write_run(tmp_path / "run", [lacking])])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("records.jsonl", b"\x00\xff\xfe\n"),
        ("records.jsonl", b"\n"),
        ("records.jsonl", b"[" * 100_000 + b"\n"),
        ("records.jsonl", json.dumps(FIELDS | {"task": "\ud800"}).encode() + b"\n"),
        ("records.jsonl", json.dumps(FIELDS | {"turn": 1}).encode() + b"\n"),
        ("records.jsonl", 2 * (json.dumps(FIELDS).encode() + b"\n")),
        ("records.jsonl", None),
        ("records-1-of-2.jsonl.gz", gzip.compress(json.dumps(FIELDS).encode() + b"\n")[:-9]),
        ("records-1-of-2.jsonl.gz", b""),
        ("run.json", b"[]"),
        ("run.json", b"3"),
        ("run.json", b"\xff"),
        ("run.json", b"{" * 100_000),
        ("run.json", b'{"model": "\\ud800"}'),
        ("faults.jsonl", b"[]\n"),
        ("faults.jsonl", b'{"source": 3, "reason": "x"}\n'),
        ("faults.jsonl", b"\xff\n"),
        ("faults.jsonl", None),
    ],
)
def test_damaged_files_are_one_sentence(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = write_run(tmp_path / "run", [])
    if content is None:
        (folder / name).unlink()
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    if content == b"":
        assert read_runs([folder])[0].records == []  # as `gzip` reads it
        return
    with pytest.raises(InputError, match=r"is no record|cannot be read|is damaged|both hold"):
        read_runs([folder])


def test_lists_by_layer_of_different_lengths_are_refused() -> None:
    records = [FIELDS, FIELDS | {"id": "1", "output_error": [0.1]}]
    with pytest.raises(InputError, match="lists of output_error differ in length"):
        layer_means(records, "output_error")


def test_matplotlib_is_asked_for_by_name(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install rocketkv\[eval\]"):
        report.write_report(folders, tmp_path / "out")


@pytest.mark.parametrize("text", ["a|b", "*bold* _it_ niah_single_1", "<script>", "[a](b) `c` \\ & #"])
def test_any_text_is_shown_to_the_letter(text: str) -> None:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    page = Reader(parser.render(f"| a |\n| --- |\n| {escape(text)} |"))
    assert "".join(page.words).rstrip("\n").endswith("\n" + text)
