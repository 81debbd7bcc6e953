"""Tests of the report's tables and plots against records written by hand."""

import re

from eval_records import MIB, answers, record, rows_of
from rocketkv.eval.report import tables
from rocketkv.eval.report.results import FULL_CACHE, Results
from rocketkv.eval.run.methods import Arm


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
