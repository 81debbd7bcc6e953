"""Prints the tables of docs/accuracy.md and docs/results.md, in Markdown, from the records in benchmarks/accuracy.

    .venv/bin/python benchmarks/accuracy_tables.py [FOLDER]

Scores and shares are in hundredths, as means over samples; intervals are those of `rocketkv eval report`.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rocketkv.eval.report.markdown import span, table
from rocketkv.eval.report.results import FULL_CACHE, Cell, Results, cell_of, layer_means, mean_of
from rocketkv.eval.report.runs import read_runs
from rocketkv.eval.report.statistics import mean_interval, ratio_interval
from rocketkv.eval.report.tables import difference
from rocketkv.eval.report.words import words_of
from rocketkv.eval.run.methods import FULL, Arm

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "accuracy"
BUDGETS = (128, 256, 512)
FOUR = (64, *BUDGETS)
GEMMA_NEEDLES = ("gemma-niah", "gemma-niah-long")
MIN_SAMPLES = 10  # the least number of samples of a cell that counts for the average
OURS = ("rocketkv", "rocketkv:kv_dtype=int8")


def main() -> None:
    """Print all tables."""
    smollm2 = read("smollm2-niah", "smollm2-ruler")
    print("# SmolLM2-135M")
    on_average(smollm2)
    for budget in BUDGETS:
        print(f"## By task at t = {budget}\n")
        by_task(smollm2, budget)
    below_published("SmolLM2-135M", smollm2)
    print("## Needles\n")
    by_length(read("smollm2-niah"), FOUR)
    of_found(read("smollm2-niah"), FOUR)
    print("## Several turns\n")
    turns = read("smollm2-niah-turns")
    (cell,) = turns.cells
    by_budget(turns, BUDGETS, lambda arm: score(turns, arm, cell))
    print("## Fidelity: error of the output, KL, top-1 agreement, MiB read per step, MiB held\n")
    by_fidelity(read("smollm2-fidelity"), FOUR)
    gemma, needles = read(*GEMMA_NEEDLES, "gemma-ruler"), read(*GEMMA_NEEDLES)
    print("# Gemma 3 270M")
    on_average(gemma)
    for budget in BUDGETS:
        print(f"## By task at t = {budget}\n")
        by_task(gemma, budget)
    print("## Needles\n")
    by_length(needles, BUDGETS)
    of_found(needles, BUDGETS)
    below_published("Gemma 3 270M", gemma)
    print("## Fidelity: error of the output, KL, top-1 agreement, MiB read per step, MiB held\n")
    by_fidelity(read("gemma-fidelity"), BUDGETS)
    by_fidelity(read("gemma-fidelity-long"), BUDGETS)


def read(*names: str) -> Results:
    """Return the records of some folders: those of the samples that every method of their task has answered."""
    records = [record for run in read_runs([FOLDER / name for name in names]) for record in run.records]
    methods: dict[Cell, set[str]] = {}
    answered: dict[tuple[Cell, str], set[str]] = {}
    for record in records:
        methods.setdefault(cell_of(record), set()).add(record["method"])
        answered.setdefault((cell_of(record), record["id"]), set()).add(record["method"])
    return Results([r for r in records if answered[cell_of(r), r["id"]] == methods[cell_of(r)]])


def on_average(results: Results) -> None:
    """Print the mean over the tasks that the model can do, and what ours score less every other method."""
    can_do = [c for c in results.solved_by_full_cache(0.5) if len(results.values(FULL_CACHE, c)) >= MIN_SAMPLES]
    print(f"## On average over {len(can_do)} of {len(results.cells)} cells\n")
    print("\n".join(f"- {cell}" for cell in can_do) + "\n")
    by_budget(results, BUDGETS, lambda arm: kept(results, arm, can_do))
    print("## Less the others, on the same samples\n")
    for one in OURS:
        print(f"{name_of(one)} less\n")
        by_budget(results, BUDGETS, lambda arm, one=one: less(results, one, arm, can_do))


def name_of(method: str) -> str:
    """Return the words for a method, in bold for ours."""
    return f"**{words_of(method)}**" if method in OURS else words_of(method)


def by_budget(results: Results, budgets: Sequence[int], cell: Callable[[Arm], str]) -> None:
    """Print a table with a row per method and a column per budget."""
    rows = [
        [name_of(name), *(cell(FULL_CACHE if name == FULL else Arm(name, budget)) for budget in budgets)]
        for name in results.methods
    ]
    print(table(["method", *(f"t = {budget}" for budget in budgets)], [row for row in rows if any(row[1:])]) + "\n")


def by_length(results: Results, budgets: Sequence[int]) -> None:
    """Print a table with a row per method and a column per cell, which has the scores at all budgets."""
    header = [f"{cell.length:,} (n = {len(results.values(FULL_CACHE, cell))})" for cell in results.cells]
    rows = []
    for name in results.methods:
        arms = [FULL_CACHE] if name == FULL else [Arm(name, budget) for budget in budgets]
        cells = [" / ".join(score(results, arm, cell) for arm in arms) for cell in results.cells]
        rows.append([name_of(name), *("-" if set(cell) <= set("- /") else cell for cell in cells)])
    print(table(["method", *header], rows) + "\n")


def of_found(results: Results, budgets: Sequence[int]) -> None:
    """Print which share of the needles that the full cache finds each method finds, over all lengths."""
    found = {
        (cell, sample) for cell in results.cells for sample, one in results.scores(FULL_CACHE, cell).items() if one
    }

    def share(arm: Arm) -> str:
        scores = [
            one
            for cell in results.cells
            for sample, one in results.scores(arm, cell).items()
            if (cell, sample) in found
        ]
        return f"{100 * np.mean(scores):.0f}% of {len(scores)}" if scores else "-"

    print(f"Of the {len(found)} needles that the full cache finds\n")
    by_budget(results, budgets, share)


def below_published(model: str, results: Results) -> None:
    """Print the cells in which our methods score below the published method by more than the 95% interval."""
    print(f"## {model}: cells in which ours are below the published method by more than noise\n")
    for method in (name for name in results.methods if name in OURS):
        arms = [Arm(method, budget) for budget in results.budgets]
        pairs = [
            (arm, cell, results.paired(arm, Arm("rocketkv_paper", arm.token_budget), [cell]))
            for arm in arms
            for cell in results.cells
        ]
        compared = [
            (arm, cell, mean_interval([a - b for a, b in zip(*both, strict=True)]))
            for arm, cell, both in pairs
            if both[0]
        ]
        worse = [
            f"{cell}, t = {arm.token_budget}: {span(interval, '+')}"
            for arm, cell, interval in compared
            if interval.high < 0
        ]
        print(f"- {name_of(method)}: {'; '.join(worse) or 'none'} of {len(compared)}")
    print()


def by_task(results: Results, budget: int) -> None:
    """Print a table with a row per cell and a column per method."""
    arms = [FULL_CACHE if name == FULL else Arm(name, budget) for name in results.methods]
    rows = [
        [str(cell), f"{len(results.values(FULL_CACHE, cell))}", *(score(results, arm, cell) for arm in arms)]
        for cell in results.cells
    ]
    print(table(["task", "n", *(name_of(name) for name in results.methods)], rows) + "\n")


def by_fidelity(results: Results, budgets: Sequence[int]) -> None:
    """Print how close each method stays to the full cache, and its bytes."""
    by_budget(results, budgets, lambda arm: faithful(results, arm))


def score(results: Results, arm: Arm, cell: Cell) -> str:
    """Return the mean of a cell, and the number of its samples where some are missing."""
    values, full = results.values(arm, cell), results.values(FULL_CACHE, cell)
    if not len(values):
        return "-"
    return f"{100 * values.mean():.0f}" + (f" (n = {len(values)})" if len(values) < len(full) else "")


def kept(results: Results, arm: Arm, cells: Sequence[Cell]) -> str:
    """Return the mean over the cells, and its fraction of the full cache's; a dash where a cell is missing."""
    ours, full = results.paired(arm, FULL_CACHE, cells)
    if len(ours) < len(cells) or min(map(len, ours)) < MIN_SAMPLES:
        return "-"
    share = ratio_interval(ours, full)
    mean = 100 * np.mean([values.mean() for values in ours])
    return f"{mean:.1f} ({100 * share.value:.0f}% [{100 * share.low:.0f}, {100 * share.high:.0f}])"


def less(results: Results, method: str, arm: Arm, cells: Sequence[Cell]) -> str:
    """Return the score of a method less another's at the same budget, paired by sample; bold if more than noise."""
    if arm == FULL_CACHE or arm.method == method:
        return ""
    return difference(results, Arm(method, arm.token_budget), arm, cells)


def faithful(results: Results, arm: Arm) -> str:
    """Return the error of the output, the KL divergence, the agreement, and the bytes read and held."""
    records = results.at(arm)
    if not records:
        return "-"
    read_mib, held_mib = (mean_of(records, name) / 2**20 for name in ("read_bytes", "kv_bytes"))
    if arm == FULL_CACHE:
        return f"{read_mib:.1f}, {held_mib:.0f}"
    error, agreement = 100 * layer_means(records, "output_error").mean(), 100 * mean_of(records, "agreement")
    return f"{error:.1f}%, {mean_of(records, 'kl'):.3f}, {agreement:.0f}%, {read_mib:.1f}, {held_mib:.0f}"


if __name__ == "__main__":
    main()
