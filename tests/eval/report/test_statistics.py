"""Tests of the report's statistics against known values."""

import math

import numpy as np
import pytest

from eval_records import answers, array, record
from rocketkv.eval.report import tables
from rocketkv.eval.report.results import FULL_CACHE, Cell, Results
from rocketkv.eval.report.statistics import mean_interval, ratio_interval, score_interval, wilson
from rocketkv.eval.run.methods import Arm


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
