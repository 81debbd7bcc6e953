"""The commands of `rocketkv eval`."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from rocketkv.commands.options import Dtype, Model, TokenBudget, Weights, numbers
from rocketkv.commands.terminal import lasting_bar, load_model, out, read_text
from rocketkv.errors import InputError

Text = Annotated[Path | None, typer.Option(help="Prose to hide facts in; default: Python's help topics.")]


def facts(
    model: Model = "smollm2",
    lengths: Annotated[str, typer.Option(help="Tokens of text, separated by commas.")] = "2000",
    budgets: Annotated[str, typer.Option(help="Token budgets, separated by commas.")] = "256",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; full is always run.")] = "rocketkv",
    pins: Annotated[str, typer.Option(help="Sinks/recents to try with each method, as in 0/0,4/16, or auto.")] = "auto",
    cases: Annotated[int, typer.Option(min=1, help="Cases per length, at depths spread evenly.")] = 30,
    text: Text = None,
    out_file: Annotated[
        Path, typer.Option("--out", help="Results, one JSON object a line; resumed if it exists.")
    ] = Path("facts.jsonl"),
    dtype: Dtype = "auto",
    weights: Weights = None,
) -> None:
    """Hide facts in prose and count which ones are found, method by method."""
    from rocketkv.eval.facts import Method, append_row, default_text, describe_source, read_rows, run, summarize
    from rocketkv.eval.methods import method_config

    wanted = [Method("full", 1)]
    for budget in numbers("budgets", budgets):
        for name in methods.split(","):
            method_config(name, budget)
            wanted += [Method(name, budget, pin) for pin in _pins(pins) if name != "full"]
    length_list = numbers("lengths", lengths)
    prose = default_text() if text is None else read_text(text)
    rows = read_rows(out_file)
    loaded = load_model(model, dtype, weights)
    with lasting_bar() as progress:
        task = progress.add_task("facts", total=len(length_list) * cases * len(wanted))
        labels = {(length, m.label, m.token_budget) for length in length_list for m in wanted}
        source = describe_source(model if weights is None else f"{model} in {weights}", prose, cases)
        rows = [row for row in rows if row.source == source and (row.length, row.method, row.token_budget) in labels]
        progress.update(task, completed=len(rows))
        for row in run(loaded, prose, length_list, wanted, cases, source=source, done=list(rows)):
            append_row(out_file, row)
            rows.append(row)
            progress.advance(task)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("tokens", "budget", "method", "found", "of full cache's finds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for line in summarize(rows):
        kept = "" if line.kept is None or not line.full else f"{line.kept}/{line.full} ({line.kept / line.full:.0%})"
        table.add_row(
            str(line.length),
            "" if line.method == "full" else str(line.token_budget),
            line.method,
            f"{line.found}/{line.cases}",
            kept,
        )
    out.print(table)


def turns(
    model: Model = "smollm2",
    length: Annotated[int, typer.Option(min=1, help="Tokens of text.")] = 2000,
    token_budget: TokenBudget = 256,
    cases: Annotated[int, typer.Option(min=1, help="Pairs of facts.")] = 20,
    text: Text = None,
    dtype: Dtype = "auto",
    weights: Weights = None,
) -> None:
    """Hide two facts in prose, ask for them in two turns, and count what each cache still finds."""
    from rocketkv.eval.facts import default_text
    from rocketkv.eval.turns import caches, run

    names = list(caches(token_budget))
    prose = default_text() if text is None else read_text(text)
    loaded = load_model(model, dtype, weights)
    rows = []
    with lasting_bar() as progress:
        task = progress.add_task("turns", total=cases * len(names))
        for row in run(loaded, prose, length, token_budget, range(cases)):
            rows.append(row)
            progress.advance(task)
    table = Table(box=box.SIMPLE_HEAD, title=f"{cases} pairs of facts in {length} tokens, t={token_budget}")
    for column in ("cache", "first turn's", "second turn's"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for name in names:
        found = [row for row in rows if row.cache == name]
        table.add_row(name, str(sum(row.first for row in found)), str(sum(row.second for row in found)))
    out.print(table)


def _pins(text: str) -> "list[tuple[int, int] | None]":
    """Pairs like 4/16 separated by commas; auto gives None."""
    pairs: list[tuple[int, int] | None] = []
    for part in text.split(","):
        try:
            sinks, recents = (None, None) if part == "auto" else map(int, part.split("/"))
        except ValueError:
            raise InputError(f"pins={text!r} is no list of pairs; write auto or, say, 0/0,4/16.") from None
        pairs.append(None if sinks is None or recents is None else (sinks, recents))
    return pairs
