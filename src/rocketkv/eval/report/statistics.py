"""Intervals of figures: Wilson's interval for shares, and a bootstrap over samples for all other figures.

Every figure is a mean over tasks of a task's mean over its samples, so that a task with many samples counts no more
than another. A resample draws each task's samples anew, with replacement, and keeps the tasks: it is uncertain
which samples were asked, not which tasks. All methods share the same draws, so comparisons are paired by sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 4000
ROUNDING = 1e-9

Values = NDArray[np.float64]  # [n], one number per sample of a task


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval, whose ends are NaN if there are too few samples.

    Attributes:
        value: the figure.
        low: the lower end of the 95% interval.
        high: the upper end of the 95% interval.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """True if there is an interval."""
        return not math.isnan(self.low)

    @property
    def leaves_out_zero(self) -> bool:
        """True if the interval lies on one side of 0, by more than rounding."""
        return self.low > ROUNDING or self.high < -ROUNDING


def wilson(successes: float, trials: int) -> Interval:
    """Return a share and its score interval (Wilson 1927), which stays in [0, 1] and has a width at 0 and 1, too.

    Centre `(p + z^2/2n) / (1 + z^2/n)`, half width `z / (1 + z^2/n) * sqrt(p(1-p)/n + z^2/4n^2)`.

    Args:
        successes: the number of successes, 0 to `trials`.
        trials: the number of trials, >= 1.

    Returns:
        The share `p = successes / trials` with its interval.

    Raises:
        ZeroDivisionError: there are no trials.
    """
    share = successes / trials
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    shrink = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return Interval(share, min(share, centre - half), max(share, centre + half))


def score_interval(tasks: Sequence[Values]) -> Interval:
    """Return the mean score over tasks, by Wilson's interval if all tasks have equally many scores of 0 or 1.

    Args:
        tasks: the samples' scores [n], task by task, one task and one sample at least.

    Returns:
        The mean of the tasks' means.

    Raises:
        ValueError: there is no task.
    """
    sizes = {len(values) for values in tasks}
    pooled = np.concatenate(tasks)
    if len(sizes) == 1 and np.isin(pooled, (0.0, 1.0)).all():
        return wilson(float(pooled.sum()), len(pooled))
    return mean_interval(tasks)


def mean_interval(tasks: Sequence[Values]) -> Interval:
    """Return the mean over tasks of any number, such as a difference of two scores of a sample, by bootstrap.

    Args:
        tasks: the numbers [n], task by task.

    Returns:
        The mean of the tasks' means. A bootstrap knows only what was seen: where all numbers are equal the interval
        has no width.

    Raises:
        ZeroDivisionError: there is no task.
    """
    return _interval(_mean(tasks), _mean_draws(tasks), tasks)


def ratio_interval(tasks: Sequence[Values], reference: Sequence[Values]) -> Interval:
    """Return the ratio of two means over tasks, paired by sample, by bootstrap.

    Args:
        tasks: the scores [n], task by task.
        reference: the scores of the same samples in the same order; their mean is not 0.

    Returns:
        Mean of `tasks` over mean of `reference`.

    Raises:
        ZeroDivisionError: there is no task, or the reference's mean is 0.
    """
    denominators = _mean_draws(reference)
    possible = denominators > 0  # a resample of few samples may have none that the reference answers
    draws = _mean_draws(tasks)[possible] / denominators[possible]
    return _interval(_mean(tasks) / _mean(reference), draws, tasks)


def _mean(tasks: Sequence[Values]) -> float:
    return sum(float(values.mean()) for values in tasks) / len(tasks)


def _mean_draws(tasks: Sequence[Values]) -> Values:
    """Return resampled means [RESAMPLES]; the draws depend only on the number of samples and the task's place."""
    sums = sum(_counts(len(values), place) @ values / len(values) for place, values in enumerate(tasks))
    return np.asarray(sums / len(tasks), dtype=np.float64)


def _interval(value: float, draws: Values, tasks: Sequence[Values]) -> Interval:
    if min(len(values) for values in tasks) < 2:  # one sample does not show how samples vary
        return Interval(value)
    low, high = np.quantile(draws, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(value, float(low), float(high))


@lru_cache(maxsize=64)
def _counts(num_samples: int, place: int) -> NDArray[np.int16]:
    """Draw how often each resample takes each sample, int64 `[RESAMPLES, n]`."""
    generator = np.random.default_rng((place, num_samples))
    counts = generator.multinomial(num_samples, np.full(num_samples, 1 / num_samples), size=RESAMPLES)
    return counts.astype(np.int16)
