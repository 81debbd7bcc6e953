"""Writes the parts of the report in Markdown."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rocketkv.eval.report import plots, tables
from rocketkv.eval.report.markdown import escape, table
from rocketkv.eval.report.results import FULL_CACHE, Cell, Results
from rocketkv.eval.report.runs import Run
from rocketkv.eval.report.statistics import RESAMPLES
from rocketkv.eval.run.fidelity import SUITE as FIDELITY
from rocketkv.figures import save_figure

LAYER_FIGURES = {"recall": "recall of attention mass", "output_error": "relative output error"}
SOLVED = 0.5  # a loss can only show on tasks where the full cache scores above this

READING = f"""
- A score is the mean over tasks and lengths of the mean over samples, times 100. A sample of several turns has the mean
  of its turns.
- Intervals are of 95 %: Wilson's where all scores are 0 or 1 and each task has as many samples, otherwise a bootstrap
  ({RESAMPLES:,} resamples of the samples within each task, percentiles). They say what other samples of the same tasks
  would change. Where all samples are alike a bootstrap sees no spread.
- Differences are taken on the samples that both methods have, and are bold where the interval leaves out 0.
- "agrees" is the share of answers that are the full cache's to the letter.
- "read / step" and "held" are bytes of keys, values and index, means over answers; "of full" is beside the full cache's
  on the same answers. SnapKV keeps t tokens per KV head here, shared by its query heads; as its authors count, each
  query head keeps t of its own: the row "counted per query head" has the bytes of that, not its score.
- "kept" is the average over the full cache's on the same samples.
"""


class Pictures:
    """The pictures beside a report.

    Attributes:
        paths: the files of the pictures drawn so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.paths: list[Path] = []

    def add(self, name: str, figure: Figure, caption: str) -> str:
        """Save a picture and return the Markdown that shows it."""
        path = self._folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.svg"
        save_figure(figure, path)
        self.paths.append(path)
        return f"![{escape(caption)}]({path.name})\n\n*{escape(caption)}*"


def sections(runs: Sequence[Run], pictures: Pictures) -> Iterator[str]:
    """Return the report's parts in Markdown, in order."""
    everything = Results([record for run in runs for record in run.records])
    scored = everything.of([cell for cell in everything.cells if cell.suite != FIDELITY])
    yield "# Evaluation"
    yield from _what_was_run(runs)
    if any(run.faults for run in runs):
        yield f"**{sum(len(run.faults) for run in runs):,} rows could not be evaluated**: see Faults below."
    if not everything.records:
        yield "No answers yet."
    if scored.records:
        yield from _averages(scored)
    for suite in scored.suites:
        several = [cell for cell in scored.multi_turn_cells if cell.suite == suite]
        single = [cell for cell in scored.cells if cell.suite == suite and cell not in several]
        for title, cells in ((suite, single), (f"{suite}, several turns", several)):
            if cells:
                yield from _suite(title, scored.of(cells), pictures)
    yield from _fidelity(everything.of([cell for cell in everything.cells if cell.suite == FIDELITY]), pictures)
    if everything.records:
        yield "## One prefill for all methods"
        yield tables.prefill_table(everything)
    yield from _faults(runs)
    yield f"## How to read it\n{READING}".rstrip()


def _what_was_run(runs: Sequence[Run]) -> Iterator[str]:
    """List the facts that all runs share, and then those in which they differ."""
    yield "## What was run"
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    shared = [name for name in names if len({run.facts.get(name) for run in runs}) == 1]
    yield table(["", "all runs"], [[escape(name), escape(runs[0].facts[name])] for name in shared], left=2)
    if different := [name for name in names if name not in shared]:
        rows = [[escape(name), *(escape(run.facts.get(name, "")) for run in runs)] for name in different]
        yield table(["", *(escape(run.name) for run in runs)], rows, left=len(runs) + 1)


def _averages(results: Results) -> Iterator[str]:
    """Report what methods keep of the full cache's average, and which differ, with multi-turn tasks apart."""
    yield f"## Average over the tasks where the full cache scores above {100 * SOLVED:.0f}"
    if FULL_CACHE not in results.arms:
        yield "No data: the full cache was not run."
        return
    for title, several in (("One turn", False), ("Several turns", True)):
        part = results.of([cell for cell in results.cells if (cell in results.multi_turn_cells) == several])
        if not part.cells:
            continue
        cells = part.solved_by_full_cache(SOLVED)
        yield f"### {title}"
        if not cells:
            yield f"None of the {len(part.cells)} tasks."
            continue
        yield f"{len(cells)} of {len(part.cells)} tasks: {', '.join(escape(cell) for cell in cells)}."
        yield tables.kept_score_table(part, cells)
        yield from _pairs(part, cells)


def _pairs(results: Results, cells: Sequence[Cell]) -> Iterator[str]:
    for budget in results.budgets:
        yield f"Row less column, t = {budget}:"
        yield tables.pair_table(results, budget, cells)


def _suite(suite: str, results: Results, pictures: Pictures) -> Iterator[str]:
    yield f"## {escape(suite)}"
    yield tables.suite_table(results)
    if results.budgets:
        yield pictures.add(f"{suite} budgets", plots.draw_budgets(results), f"{suite}: score against token budget")
    if results.multi_turn_cells:
        yield "### By turn"
        yield tables.turn_table(results)
        yield pictures.add(f"{suite} by turn", plots.draw_turns(results), f"{suite}: score at each turn")
    for task in results.placed_tasks:
        caption = f"{task}: score by length and depth"
        yield pictures.add(f"{suite} {task} depths", plots.draw_depths(results, task), caption)
    yield "### By task"
    for budget in results.rows:
        if budget is not None:
            yield f"t = {budget}:"
        yield tables.task_table(results, budget)
    yield "### Method against method"
    yield from _pairs(results, results.cells)


def _fidelity(results: Results, pictures: Pictures) -> Iterator[str]:
    if not results.cells:
        return
    yield "## Fidelity"
    yield "Teacher-forced: the text's own next tokens are decoded against each cache, and compared with the full cache."
    yield tables.fidelity_table(results)
    for length in sorted({cell.length or 0 for cell in results.cells}):
        part = results.of([cell for cell in results.cells if cell.length == length])
        yield f"### {length:,} tokens, layer by layer"
        for name, label in LAYER_FIGURES.items():
            caption = f"{label}, {length:,} tokens"
            yield pictures.add(f"fidelity {name} {length}", plots.draw_layers(part, name, label), caption)
        caption = f"tokens kept by each layer, {length:,} tokens"
        if figure := plots.draw_kept(part):
            yield pictures.add(f"fidelity kept {length}", figure, caption)


def _faults(runs: Sequence[Run]) -> Iterator[str]:
    yield "## Faults"
    rows = [
        [escape(run.name), escape(fault["source"]), escape(fault["reason"])] for run in runs for fault in run.faults
    ]
    yield f"{len(rows):,} in all." if rows else "None."
    if rows:
        yield table(["run", "where", "what"], rows, left=3)
