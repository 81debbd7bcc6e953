"""Arranges the records of one or several runs for tables: scores by method, budget and task."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rocketkv.errors import InputError
from rocketkv.eval.report.statistics import Values
from rocketkv.eval.run.methods import FULL, Arm, sort_methods
from rocketkv.eval.run.records import Record


class Cell(NamedTuple):
    """A task at a length; an average counts each cell once."""

    suite: str
    task: str
    length: int | None

    def __str__(self) -> str:
        """Return the name of the cell in tables."""
        return self.task if self.length is None else f"{self.task} at {self.length:,}"


FULL_CACHE = Arm(FULL, None)


@dataclass(frozen=True)
class Results:
    """The answers of one model, one record per sample, method, budget and turn.

    Attributes:
        records: the records that `rocketkv.eval.run.records` writes, with no answer twice.
    """

    records: Sequence[Record]
    _by_place: dict[tuple[Arm, Cell], list[Record]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for record in self.records:
            place = _arm(record["method"], record["token_budget"]), cell_of(record)
            self._by_place.setdefault(place, []).append(record)

    def of(self, cells: Collection[Cell]) -> "Results":
        """Return the results of some cells only."""
        return Results([record for record in self.records if cell_of(record) in cells])

    @cached_property
    def suites(self) -> list[str]:
        """The names of the suites, in order of appearance."""
        return list(dict.fromkeys(cell.suite for cell in self.cells))

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells, in order of the tasks' appearance, shorter lengths first."""
        tasks = list(dict.fromkeys((record["suite"], record["task"]) for record in self.records))
        cells = {cell for _, cell in self._by_place}
        return sorted(cells, key=lambda cell: (tasks.index((cell.suite, cell.task)), cell.length or 0))

    @cached_property
    def methods(self) -> list[str]:
        """List the methods in the order of `METHODS`, full cache first."""
        return sort_methods(arm.method for arm, _ in self._by_place)

    @cached_property
    def budgets(self) -> list[int]:
        """The budgets in tokens, ascending."""
        return sorted({v.token_budget for v, _ in self._by_place if v.token_budget is not None})

    @cached_property
    def rows(self) -> Sequence[int | None]:
        """The budgets, for which tables and plots have a row each; None alone if there is only the full cache."""
        return self.budgets or [None]

    @cached_property
    def arms(self) -> list[Arm]:
        """The arms: the full cache first, then budget by budget."""
        arms = {arm for arm, _ in self._by_place}
        return sorted(arms, key=lambda arm: (arm.token_budget or 0, self.methods.index(arm.method)))

    def arms_at(self, budget: int | None) -> list[Arm]:
        """Return the arms at one budget, and the full cache."""
        return [arm for arm in self.arms if arm.token_budget in (None, budget)]

    @cached_property
    def multi_turn_cells(self) -> list[Cell]:
        """The cells whose samples have a second question."""
        cells = {cell_of(record) for record in self.records if record["turn"] > 0}
        return [cell for cell in self.cells if cell in cells]

    @cached_property
    def placed_tasks(self) -> list[str]:
        """The tasks whose answers stand at one known depth of a text of a known length."""
        nowhere = {record["task"] for record in self.records if record["depth"] is None or record["length"] is None}
        return [task for task in dict.fromkeys(cell.task for cell in self.cells) if task not in nowhere]

    def at(self, arm: Arm, cells: Iterable[Cell] | None = None) -> list[Record]:
        """Return the records of a method at a budget, in some cells or in all."""
        return [
            record
            for cell in (self.cells if cells is None else cells)
            for record in self._by_place.get((arm, cell), ())
        ]

    def scores(self, arm: Arm, cell: Cell, figure: str = "score") -> dict[str, float]:
        """Return a number per sample, the mean over its turns; samples without that figure are left out."""
        turns: dict[str, list[float]] = {}
        for record in self._by_place.get((arm, cell), ()):
            if figure in record["scores"]:
                turns.setdefault(record["id"], []).append(record["scores"][figure])
        return {sample: sum(values) / len(values) for sample, values in turns.items()}

    def values(self, arm: Arm, cell: Cell, figure: str = "score") -> Values:
        """Return the `scores` as an array [n]."""
        return np.array(list(self.scores(arm, cell, figure).values()), dtype=np.float64)

    def tasks(self, arm: Arm, cells: Iterable[Cell], figure: str = "score") -> list[Values]:
        """Return the `values` cell by cell; cells without data are left out."""
        return [values for cell in cells if len(values := self.values(arm, cell, figure))]

    def figures(self, cell: Cell) -> list[str]:
        """Return the names of the figures that a task's scorer gives, `score` first."""
        names = {name for arm in self.arms for record in self.at(arm, [cell]) for name in record["scores"]}
        return sorted(names, key=lambda name: (name != "score", name))

    def paired(self, arm: Arm, other: Arm, cells: Iterable[Cell]) -> tuple[list[Values], list[Values]]:
        """Return both methods' scores of the samples that both have, cell by cell, without cells that have none."""
        pairs = []
        for cell in cells:
            ours, theirs = self.scores(arm, cell), self.scores(other, cell)
            if shared := [sample for sample in ours if sample in theirs]:
                pairs.append((np.array([ours[s] for s in shared]), np.array([theirs[s] for s in shared])))
        return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]

    def solved_by_full_cache(self, at_least: float) -> list[Cell]:
        """Return the cells where the full cache's mean score is above `at_least`."""
        means = {cell: self.values(FULL_CACHE, cell) for cell in self.cells}
        return [cell for cell, values in means.items() if len(values) and values.mean() > at_least]


def mean_of(records: Iterable[Record], name: str) -> float:
    """Return the mean of a field over the records that have it, NaN if none has."""
    values = [record[name] for record in records if record.get(name) is not None]
    return sum(values) / len(values) if values else math.nan


def turn_scores(results: Results, arm: Arm) -> dict[int, float]:
    """Return the mean score at each turn, from 0, over all samples of all tasks."""
    turns: dict[int, list[float]] = {}
    for record in results.at(arm):
        turns.setdefault(record["turn"], []).append(record["scores"]["score"])
    return {turn: sum(scores) / len(scores) for turn, scores in sorted(turns.items())}


def layer_means(records: Sequence[Record], name: str) -> NDArray[np.float64]:
    """Return the mean over records of a list by layer [layers, ...], empty if no record has it.

    Raises:
        InputError: the lists differ in length, as with models of different depth.
    """
    lists = [record[name] for record in records if record.get(name) is not None]
    if len({np.shape(values) for values in lists}) > 1:
        raise InputError(f"the records' lists of {name} differ in length; report on one model at a time.")
    return np.mean(lists, axis=0) if lists else np.array([])


@cache
def _arm(method: str, token_budget: int | None) -> Arm:
    """Return one arm for all records of a kind."""
    return Arm(method, token_budget)


def cell_of(record: Record) -> Cell:
    """Say which cell a record belongs to."""
    return Cell(record["suite"], record["task"], record["length"])
