"""Prints the tables of docs/accuracy.md and docs/results.md, in Markdown, from the records in benchmarks/accuracy.

    .venv/bin/python benchmarks/accuracy_tables.py

Scores and shares are in hundredths, as means over samples; intervals are those of `rocketkv eval report`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rocketkv.eval.report.markdown import table
from rocketkv.eval.report.results import FULL_CACHE, Cell, Results, layer_means, mean_of
from rocketkv.eval.report.runs import read_runs
from rocketkv.eval.report.statistics import mean_interval, ratio_interval
from rocketkv.eval.report.tables import difference
from rocketkv.eval.run.methods import Arm

HERE = Path(__file__).parent / "accuracy"
FOLDERS = ("niah", "qa", "ruler", "ruler-4096")  # runs with one question per sample
TURNS = ("niah-turns", "squad-turns")
BEYOND = ("lines", "kv")  # tasks that this model cannot do
SPREAD = ("gemma-niah", "gemma-niah-long", "smollm2-niah", "smollm2-ruler", "smollm2-peak")  # the default settings
SPREAD_TEXTS = ("gemma-fidelity", "smollm2-fidelity")  # the same setting
ABLATIONS = (("ablation-niah", "ablation-fidelity"), ("ablation-hybrid-niah", "ablation-hybrid-fidelity"))
BUDGETS = (128, 256, 512)
MIN_SAMPLES = 30  # the least score of a cell that counts for the average


def main() -> None:
    """Print all tables."""
    single, turns, fidelity = read(*FOLDERS), read(*TURNS), read("fidelity")
    can_do = [c for c in single.solved_by_full_cache(0.5) if len(single.values(FULL_CACHE, c)) >= MIN_SAMPLES]
    print(f"## On average over {len(can_do)} of {len(single.cells)} cells: {', '.join(map(str, can_do))}\n")
    by_budget(single, BUDGETS, lambda arm: kept(single, arm, can_do))
    for one in ("rocketkv", "rocketkv:selection=hybrid", "rocketkv:kv_dtype=int8"):
        print(f"## {one} less the others, on the same samples\n")
        by_budget(single, BUDGETS, lambda arm, one=one: less(single, one, arm, can_do))
    for budget in BUDGETS:
        print(f"## By task at t = {budget}\n")
        arms = single.arms_at(budget)
        rows = [by_task(single, cell, arms) for cell in single.cells]
        print(table(["task", "n", *(arm.method for arm in arms)], rows) + "\n")
    print("## Needles by length\n")
    needles = [cell for cell in single.cells if cell.suite == "niah"]
    by_budget(single, (64, *BUDGETS), lambda arm: " / ".join(score(single, arm, cell) for cell in needles))
    print("## Several turns\n")
    for cell in turns.cells:
        print(f"### {cell}\n")
        by_budget(
            turns, BUDGETS, lambda arm, cell=cell: f"{score(turns, arm, cell)} {against_oracle(turns, arm, cell)}"
        )
    print("## Lines and keys, which are beyond this model\n")
    beyond = read(*BEYOND)
    by_budget(beyond, BUDGETS, lambda arm: " / ".join(score(beyond, arm, cell) for cell in beyond.cells))
    print("## Fidelity: KL, top-1 agreement, MiB read per step, MiB held, relative error of the output\n")
    by_budget(fidelity, (64, *BUDGETS), lambda arm: faithful(fidelity, arm))
    print("## Of the published method: error above the oracle, mean and worst text; bytes held, in all and by text\n")
    by_budget(fidelity, (64, *BUDGETS), lambda arm: beside_published(fidelity, arm))
    for name in SPREAD:
        results = read(name)
        cells = results.cells
        print(f"## {name}: {', '.join(f'{c} (n = {len(results.values(FULL_CACHE, c))})' for c in cells)}\n")
        by_budget(
            results,
            BUDGETS,
            lambda arm, results=results, cells=cells: " / ".join(score(results, arm, cell) for cell in cells),
        )
    for name in SPREAD_TEXTS:
        print(f"## {name}: KL, top-1 agreement, MiB read per step, MiB held, relative error of the output\n")
        texts = read(name)
        by_budget(texts, (64, *BUDGETS), lambda arm, texts=texts: faithful(texts, arm))
    for names in ABLATIONS:
        print(f"## {', '.join(names)}: needles, KL, relative error of the output\n")
        ablation = read(*names)
        by_budget(ablation, BUDGETS, lambda arm, ablation=ablation: ablated(ablation, arm))


def read(*names: str) -> Results:
    """Return the records of some folders."""
    return Results([record for run in read_runs([HERE / name for name in names]) for record in run.records])


def by_budget(results: Results, budgets: Sequence[int], cell: Callable[[Arm], str]) -> None:
    """Return a table with a row per method and a column per budget."""
    rows = [[name, *(cell(Arm(name, budget)) for budget in budgets)] for name in results.methods if name != "full"]
    full = cell(FULL_CACHE)
    header = ["method", *(f"t = {budget}" for budget in budgets)]
    print(table(header, [["full", *[full] * len(budgets)], *rows]) + "\n")


def score(results: Results, arm: Arm, cell: Cell) -> str:
    """Return a cell's mean."""
    values = results.values(arm, cell)
    return f"{100 * values.mean():.1f}" if len(values) else "-"


def by_task(results: Results, cell: Cell, arms: Sequence[Arm]) -> list[str]:
    """Return a row: the cell's name, its number of samples, and each method's mean."""
    return [str(cell), f"{len(results.values(FULL_CACHE, cell))}", *(score(results, arm, cell) for arm in arms)]


def kept(results: Results, arm: Arm, cells: Sequence[Cell]) -> str:
    """Return the mean over the cells, and its fraction of the full cache's; a dash where a cell is missing."""
    ours, full = results.paired(arm, FULL_CACHE, cells)
    if len(ours) < len(cells) or min(map(len, ours)) < MIN_SAMPLES:
        return "-"
    share = ratio_interval(ours, full)
    mean = 100 * np.mean([values.mean() for values in ours])
    return f"{mean:.1f} ({100 * share.value:.0f}% [{100 * share.low:.0f}, {100 * share.high:.0f}])"


def less(results: Results, method: str, arm: Arm, cells: Sequence[Cell]) -> str:
    """Return a method's score less another's at the same budget, paired by sample; bold if it is more than noise."""
    if arm == FULL_CACHE:
        return ""
    return difference(results, Arm(method, arm.token_budget), arm, cells)


def against_oracle(results: Results, arm: Arm, cell: Cell) -> str:
    """Return the oracle's score less a method's, with its interval."""
    if arm == FULL_CACHE:
        return ""
    oracle, ours = results.paired(Arm("exact_topk", arm.token_budget), arm, [cell])
    interval = mean_interval([his - mine for his, mine in zip(oracle, ours, strict=True)]) if ours else None
    return "" if interval is None else f"({100 * interval.low:+.0f} to {100 * interval.high:+.0f} below the oracle)"


def faithful(results: Results, arm: Arm) -> str:
    """Return how close a method stays to the full cache, and its bytes."""
    records = results.at(arm)
    if not records:
        return "-"
    figures = [f"{mean_of(records, 'kl'):.3f}", f"{100 * mean_of(records, 'agreement'):.0f}%"]
    figures += [f"{mean_of(records, name) / 2**20:.1f}" for name in ("read_bytes", "kv_bytes")]
    error = layer_means(records, "output_error")
    return ", ".join([*figures, f"{100 * error.mean():.1f}%"] if error.size else figures)


def beside_published(results: Results, arm: Arm) -> str:
    """Return a method's error above the oracle's and its bytes, over the published method's, as means."""
    if arm == FULL_CACHE:
        return ""
    errors, held, published_held = [], [], []
    for cell in results.cells:
        found = [
            results.at(Arm(name, arm.token_budget), [cell]) for name in (arm.method, "exact_topk", "rocketkv_paper")
        ]
        if not all(found):
            return "-"
        ours, oracle, published = (layer_means(records, "output_error").mean() for records in found)
        errors.append((ours - oracle) / (published - oracle))
        held.append(mean_of(found[0], "kv_bytes"))
        published_held.append(mean_of(found[2], "kv_bytes"))
    parts = np.divide(held, published_held)
    return (
        f"{np.mean(errors):.2f}, {max(errors):.2f}; "
        f"{sum(held) / sum(published_held):.2f}, {parts.min():.2f} to {parts.max():.2f}"
    )


def ablated(results: Results, arm: Arm) -> str:
    """Return the needle and fidelity figures of one setting."""
    needles, passages = (
        results.at(arm, [c for c in results.cells if (c.suite == "fidelity") == told]) for told in (False, True)
    )
    if not passages or arm == FULL_CACHE:
        return ""
    found = f"{100 * np.mean([record['scores']['score'] for record in needles]):.0f}" if needles else "-"
    error = 100 * layer_means(passages, "output_error").mean()
    return f"{found}, {mean_of(passages, 'kl'):.3f}, {error:.1f}%"


if __name__ == "__main__":
    main()
