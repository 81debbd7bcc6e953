"""The report's tables in Markdown; each function makes one table from results."""

import math
from collections.abc import Sequence

import numpy as np

from rocketkv.eval.report.markdown import NO_DATA, budget_name, escape, num_bytes, percent, span, span_of_counts, table
from rocketkv.eval.report.results import FULL_CACHE, Cell, Results, cell_of, layer_means, mean_of, turn_scores
from rocketkv.eval.report.statistics import Interval, mean_interval, ratio_interval, score_interval
from rocketkv.eval.run.methods import Arm
from rocketkv.eval.run.records import Record

PER_QUERY_HEAD = "snapkv"  # the method whose authors let each query head keep its own tokens
BARS = {256: 90, 512: 95}  # the percentage of the full cache's average to reach at a budget


def suite_table(results: Results) -> str:
    """Table one suite, each method at each budget: score, what it loses, agreement, bytes."""
    rows = []
    for arm in results.arms:
        records = results.at(arm)
        row = [escape(arm.method), budget_name(arm.token_budget)]
        row += [span(score_interval(results.tasks(arm, results.cells)))]
        row += ["" if arm == FULL_CACHE else difference(results, arm, FULL_CACHE)]
        row += [percent(mean_of(records, "agrees")), _num_samples(results, records)]
        rows.append([*row, *_bytes(results, arm)])
        if arm.method == PER_QUERY_HEAD:
            counted = _bytes(results, arm, times=mean_of(records, "group_size"))
            rows.append([f"{arm.method}, counted per query head", row[1], *[""] * 4, *counted])
    header = ["method", "t", "score", "less full cache's", "agrees", "n", "read / step", "of full", "held", "of full"]
    return table(header, rows)


def task_table(results: Results, budget: int | None) -> str:
    """Table one suite at one budget, a row per task and length, a column per method."""
    arms = results.arms_at(budget)
    rows = []
    for cell in results.cells:
        for figure in results.figures(cell):
            samples = [results.values(arm, cell, figure) for arm in arms]
            scores = [span(score_interval([values])) if len(values) else NO_DATA for values in samples]
            name = f"{cell}" if figure == "score" else f"{cell}, {figure}"
            rows.append([escape(name), span_of_counts(len(values) for values in samples), *scores])
    return table(["task", "n", *(escape(arm.method) for arm in arms)], rows)


def turn_table(results: Results) -> str:
    """Table the score at each turn, over all samples of all tasks."""
    lines = {arm: turn_scores(results, arm) for arm in results.arms}
    turns = sorted({turn for scores in lines.values() for turn in scores})
    rows = [
        [escape(arm.method), budget_name(arm.token_budget)]
        + [f"{100 * scores[turn]:.1f}" if turn in scores else NO_DATA for turn in turns]
        for arm, scores in lines.items()
    ]
    return table(["method", "t", *(f"turn {turn + 1}" for turn in turns)], rows)


def kept_score_table(results: Results, cells: Sequence[Cell]) -> str:
    """Table what each method keeps of the full cache's average over some tasks, and whether that is enough."""
    rows = []
    for arm in results.arms:
        ours, full = results.paired(arm, FULL_CACHE, cells)
        if arm == FULL_CACHE or not ours:
            continue
        kept = ratio_interval(ours, full)
        each = float(np.mean([mine.mean() / theirs.mean() for mine, theirs in zip(ours, full, strict=True)]))
        rows.append(
            [
                escape(arm.method),
                budget_name(arm.token_budget),
                f"{len(ours)} of {len(cells)}",
                span_of_counts(len(values) for values in ours),
                f"{100 * float(np.mean([values.mean() for values in ours])):.1f}",
                f"{100 * float(np.mean([values.mean() for values in full])):.1f}",
                span(kept),
                f"{100 * each:.1f}",
                _verdict(kept, arm, complete=len(ours) == len(cells)),
            ]
        )
    header = ["method", "t", "tasks", "n per task", "average", "full cache's", "kept, %", "mean of the tasks' %", "bar"]
    return table(header, rows)


def pair_table(results: Results, budget: int, cells: Sequence[Cell]) -> str:
    """Table the row's score less the column's on the samples that both have, each pair once."""
    arms = results.arms_at(budget)
    rows = []
    for place, one in enumerate(arms[1:], 1):
        differences = [difference(results, one, other, cells) for other in arms[:place]]
        rows.append([escape(one.method), *differences, *[""] * (len(arms) - 1 - place)])
    return table(["", *(escape(arm.method) for arm in arms[:-1])], rows)


def fidelity_table(results: Results) -> str:
    """Table teacher-forced figures by length, as means over texts."""
    rows = []
    for length in sorted({cell.length or 0 for cell in results.cells}):
        cells = [cell for cell in results.cells if cell.length == length]
        for arm in results.arms:
            if not (records := results.at(arm, cells)):
                continue
            row = [f"{length:,}", escape(arm.method), budget_name(arm.token_budget), f"{len(records)}"]
            row += [percent(mean_of(records, "agreement")), f"{mean_of(records, 'kl'):.4f}"]
            row += [f"{mean_of(records, 'perplexity'):.2f}"]
            for name in ("recall", "output_error"):
                row.append("" if arm == FULL_CACHE else percent(_mean_of_layers(records, name)))
            rows.append([*row, num_bytes(mean_of(records, "read_bytes")), num_bytes(mean_of(records, "kv_bytes"))])
    header = ["tokens", "method", "t", "texts", "top-1 agreement", "KL", "perplexity", "recall", "output error"]
    return table([*header, "read / step", "held"], rows)


def prefill_table(results: Results) -> str:
    """Table the time that one prefill for all methods saved, compared with a prefill for each row."""
    rows = []
    for suite in results.suites:
        part = results.of([cell for cell in results.cells if cell.suite == suite])
        spent = sum(record["prefill_s"] / record["rows"] for record in part.records)
        alone = sum(record["prefill_s"] for record in part.records)
        rows.append([escape(suite), f"{spent:,.0f}", f"{alone:,.0f}", f"{alone - spent:,.0f}"])
    return table(["suite", "prefills took, s", "a prefill for each method, s", "saved, s"], rows)


def difference(results: Results, one: Arm, other: Arm, cells: Sequence[Cell] | None = None) -> str:
    """Return the mean difference of two scores, paired by sample, in bold where it is more than noise."""
    ours, theirs = results.paired(one, other, results.cells if cells is None else cells)
    if not ours:
        return NO_DATA
    interval = mean_interval([mine - his for mine, his in zip(ours, theirs, strict=True)])
    text = span(interval, sign="+")
    return f"**{text}**" if interval.leaves_out_zero else text


def _bytes(results: Results, arm: Arm, times: float = 1) -> list[str]:
    """Return the bytes read per step and those stored, each also as a share of the full cache's."""
    cells = []
    for name in ("read_bytes", "kv_bytes"):
        cells += [num_bytes(times * mean_of(results.at(arm), name))]
        cells += [percent(times * _share_of_full(results, arm, name))]
    return cells


def _share_of_full(results: Results, arm: Arm, name: str) -> float:
    """Return the mean of a field relative to the full cache's, over answers that have the field under both."""

    def by_answer(of: Arm) -> dict[tuple[object, ...], Record]:
        records = (record for record in results.at(of) if record.get(name) is not None)
        return {(cell_of(record), record["id"], record["turn"]): record for record in records}

    ours, full = by_answer(arm), by_answer(FULL_CACHE)
    shared = [answer for answer in ours if answer in full]
    return mean_of([ours[a] for a in shared], name) / mean_of([full[a] for a in shared], name)


def _num_samples(results: Results, records: Sequence[Record]) -> str:
    """Say how many, and of how many tasks where some have none."""
    samples = {(record["task"], record["length"], record["id"]) for record in records}
    num_tasks = len({(record["task"], record["length"]) for record in records})
    missing = "" if num_tasks == len(results.cells) else f" ({num_tasks} of {len(results.cells)} tasks)"
    return f"{len(samples):,}{missing}"


def _mean_of_layers(records: Sequence[Record], name: str) -> float:
    layers = layer_means(records, name)
    return float(layers.mean()) if layers.size else math.nan


def _verdict(kept: Interval, arm: Arm, complete: bool) -> str:
    bar = BARS.get(arm.token_budget or 0)
    if bar is None:
        return ""
    if not complete:
        return f"{bar} %: tasks missing"
    return f"{bar} %: {'reached' if 100 * kept.value >= bar else 'missed'}"
