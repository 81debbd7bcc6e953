"""Fair timing: all contenders take turns in the same rounds, until their medians are stable."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

Key = TypeVar("Key")
Call = Callable[[], float]  # a call does the work once and returns the milliseconds that count
OnRound = Callable[[int], None]

FLOORS = {"sparse": "sparse_floor", "rocketkv": "sparse_floor", "dense": "dense_floor"}

LEAST_ROUNDS = 3
STABLE_ROUNDS = 15
MOST_ROUNDS = 200
STABLE_WIDTH = 0.04  # the width of the median's 95% interval, as a fraction of the median


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        repeats: the number of rounds; 0 measures until medians are stable or the time is up.
        limit_s: the seconds that one row may take; it gets at least `LEAST_ROUNDS` rounds.
    """

    repeats: int = 0
    limit_s: float = 20.0


@dataclass(frozen=True)
class Point:
    """One point of a sweep, whose contenders are compared in the same rounds.

    Attributes:
        seq_len: the number of tokens of context.
        batch: the number of rows.
        token_budgets: the budgets of our configurations, in tokens.
        pace: the time that measuring may take.
    """

    seq_len: int
    batch: int
    token_budgets: Sequence[int]
    pace: Pace

    def __str__(self) -> str:
        return f"S={self.seq_len} batch={self.batch}"


@dataclass(frozen=True)
class Row:
    """One line of a result.

    Attributes:
        name: the name of what was measured.
        times_ms: the milliseconds of every repeat, or one computed value for a floor.
        num_bytes: the bytes that a call moves or stores; the benchmark says which.
        seq_len: the number of tokens of context.
        token_budget: the configuration's budget in tokens; None for a row without one.
        batch: the number of rows.
        details: further figures, by name.
    """

    name: str
    times_ms: list[float]
    num_bytes: int
    seq_len: int
    token_budget: int | None
    batch: int
    details: dict[str, object] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        """The median of the repeats, in milliseconds."""
        return median(self.times_ms)

    def record(self) -> dict[str, object]:
        """Return the row as a JSON object."""
        return {
            "name": self.name,
            "seq_len": self.seq_len,
            "token_budget": self.token_budget,
            "batch": self.batch,
            "median_ms": self.median_ms,
            "min_ms": min(self.times_ms),
            "max_ms": max(self.times_ms),
            "repeats": len(self.times_ms),
            "bytes": self.num_bytes,
            **self.details,
        }


def floor_of(name: str) -> str | None:
    """Return the row with the floor of a row; each selection method, as in `sparse:NAME`, has its own floor."""
    return f"{name}_floor" if ":" in name else FLOORS.get(name)


def floor_rows(rows: Iterable[Row], bandwidth: float) -> list[Row]:
    """Return rows with the time that reading the bytes of our rows takes at `bandwidth` bytes per second."""
    floors: dict[tuple[object, ...], Row] = {}
    for row in rows:
        name = floor_of(row.name)
        if name is None:
            continue
        floor = Row(name, [1000 * row.num_bytes / bandwidth], row.num_bytes, row.seq_len, row.token_budget, row.batch)
        floor.details["bandwidth_gb_per_s"] = bandwidth / 1e9
        if "tokens_per_second" in row.details:
            floor.details["tokens_per_second"] = 1000 * row.batch / floor.median_ms
        floors.setdefault((name, row.seq_len, row.token_budget, row.batch), floor)
    return list(floors.values())


def timed(work: Callable[[], object], device: str = "cpu") -> float:
    """Return the milliseconds that `work` takes, between two events on a GPU."""
    if device != "cpu":
        return _timed_on_gpu(work)
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def _timed_on_gpu(work: Callable[[], object]) -> float:
    from torch.cuda import Event

    start, end = (Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def run_rounds(calls: Mapping[Key, Call], pace: Pace, on_round: OnRound | None = None) -> dict[Key, list[float]]:
    """Let all calls take turns, one after the other in each round, after a round that does not count.

    Args:
        calls: the functions to measure.
        pace: how long to measure; a call whose time is up sits out the rounds that others still need.
        on_round: a function that is called with the number of each finished round.

    Returns:
        The milliseconds of every repeat of every call.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    spent = dict.fromkeys(calls, 0.0)
    for call in calls.values():
        call()
    for done in range(1, (pace.repeats or MOST_ROUNDS) + 1):
        for key, call in calls.items():
            if pace.repeats or len(times[key]) < LEAST_ROUNDS or spent[key] < pace.limit_s:
                start = time.perf_counter()
                times[key].append(call())
                spent[key] += time.perf_counter() - start
        if on_round is not None:
            on_round(done)
        if not pace.repeats and all(
            is_stable(times[key]) or (done >= LEAST_ROUNDS and spent[key] >= pace.limit_s) for key in calls
        ):
            break
    return times


def is_stable(times: list[float]) -> bool:
    """Return whether the median's 95% interval, by order statistics, is at most `STABLE_WIDTH` wide."""
    count = len(times)
    if count < STABLE_ROUNDS:
        return False
    ordered = sorted(times)
    half = math.sqrt(count)  # the interval ends 1.96 * sqrt(count) / 2 ranks from the middle
    low, high = ordered[max(0, math.floor(count / 2 - half))], ordered[min(count - 1, math.ceil(count / 2 + half))]
    return high - low <= STABLE_WIDTH * median(times)
