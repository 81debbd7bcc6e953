"""The table of all runs, the engines' answers, and why an engine did not run."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import ENGINES, Job
from benchmarks.peers.run import Run


@dataclass
class Outcome:
    """All runs of an engine, or why there are none."""

    runs: list[Run] = field(default_factory=list)
    problem: str | None = None


def show(outcomes: dict[str, Outcome], job: Job, tokenizer: Any) -> None:
    """Print the table, the answers and what did not run."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = Console(width=max(console.width, 120))
    table = Table(title=f"{len(job.prompt):,} prompt tokens, {job.new_tokens} new ones, {job.threads} threads")
    table.add_column("engine")
    table.add_column("version")
    table.add_column("weights / cache")
    for column in ("ms per token", "min to max", "fastest tenth", "prefill s", "peak MiB", "others"):
        table.add_column(column, justify="right")
    openvino_name = Path(job.openvino_model or "").name
    for name, outcome in outcomes.items():
        if not outcome.runs:
            continue
        times = [statistics.mean(run.token_ms) for run in outcome.runs]
        others = [run.others for run in outcome.runs if run.others is not None]
        peaks = [run.peak_mib for run in outcome.runs if run.peak_mib is not None]
        table.add_row(
            name,
            outcome.runs[0].version,
            ENGINES[name].formats.format(openvino=openvino_name),
            f"{statistics.median(times):.1f}",
            f"{min(times):.1f} to {max(times):.1f}",
            f"{statistics.quantiles([ms for run in outcome.runs for ms in run.token_ms], n=10)[0]:.1f}",
            f"{statistics.median(run.prefill_s for run in outcome.runs):.1f}",
            f"{max(peaks):,.0f}" if peaks else "?",
            f"{max(others):.0%}" if others else "?",
        )
    console.print(table)
    for name, outcome in outcomes.items():
        if outcome.runs:
            tokens = outcome.runs[0].tokens
            end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
            text = tokenizer.decode([x for x in tokens[:end] if isinstance(x, int)])
            text += "".join(x for x in tokens[:end] if isinstance(x, str))
            console.print(f"{name}: {text!r}", markup=False, highlight=False, soft_wrap=True)
        if outcome.problem:
            console.print(f"{name} {outcome.problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)
