"""The commands of `rocketkv eval`: they run methods on a suite and report."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from rocketkv.commands.options import Dtype, Model, WeightDtype, numbers
from rocketkv.commands.terminal import err, lasting_bar, load_model, out, read_text
from rocketkv.errors import InputError

if TYPE_CHECKING:
    from rocketkv.eval.run.journal import Shard

FIDELITY = "fidelity"  # the suite that has no questions
PARITIES = ("rocketkv",)  # the papers whose published settings a suite can follow
Folder = Annotated[Path, typer.Option("--out", help="Folder for the results; a stopped run into this folder goes on.")]


def run(
    suite: Annotated[str, typer.Option(help="niah, ruler, longbench, scbench, qa, rows or fidelity.")],
    folder: Folder,
    model: Model = "smollm2",
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; rocketkv:window_size=16 is a method with an option.")
    ] = "full,rocketkv",
    budgets: Annotated[str, typer.Option(help="Token budgets, separated by commas.")] = "256",
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths, separated by commas. Default: the suite's.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Number of samples per task and length. Default: all.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of the suite, separated by commas. Default: all.")] = None,
    data: Annotated[
        str | None, typer.Option(help="File or folder with the suite's data, or hf://datasets/OWNER/NAME@COMMIT.")
    ] = None,
    haystack: Annotated[
        Path | None, typer.Option(help="File with prose to hide needles in. Default: the texts of Python's help.")
    ] = None,
    parity: Annotated[str | None, typer.Option(help="rocketkv makes every setting as the paper published it.")] = None,
    mode: Annotated[
        str, typer.Option(help="multi_turn or multi_request, for samples with several questions.")
    ] = "multi_turn",
    shard: Annotated[str, typer.Option(help="i/n runs only every n-th sample, from the i-th on.")] = "1/1",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn at random.")] = 42,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="The most tokens of a text; a longer text loses its middle. Default: what fits."),
    ] = None,
    dtype: Dtype = "auto",
    weight_dtype: WeightDtype = None,
) -> None:
    """Let methods answer the samples of a suite, with one prefill for all methods.

    The command exits with 1 if some samples could not be evaluated, and names them in OUT/faults.jsonl.
    """
    from rocketkv.eval.data.dialogue import MODES
    from rocketkv.eval.data.haystack import default_text
    from rocketkv.eval.data.hub import SCHEME, locate_data
    from rocketkv.eval.run import fidelity, runner
    from rocketkv.eval.run.journal import Journal
    from rocketkv.eval.run.methods import make_arms
    from rocketkv.eval.run.passages import find_passages
    from rocketkv.eval.suites import find_suite
    from rocketkv.eval.suites.base import Request
    from rocketkv.machine import describe_machine, describe_versions

    if mode not in MODES:
        raise InputError(f"mode={mode!r} does not exist; choose from {', '.join(MODES)}.")
    if parity is not None and parity not in PARITIES:
        raise InputError(f"parity={parity!r} does not exist; choose from {', '.join(PARITIES)}.")
    if suite == FIDELITY:
        asked = {"tasks": tasks, "parity": parity, "max-length": max_length, "mode": mode if mode != MODES[0] else None}
        if unused := [f"--{name}" for name, value in asked.items() if value is not None]:
            raise InputError(f"fidelity has no use for {' and '.join(unused)}; run it without.")
    arms = make_arms(methods.split(","), numbers("budgets", budgets))
    part = _shard(shard)
    chosen = None if suite == FIDELITY else find_suite(suite)
    data_path = None if data is None else locate_data(data)
    text = default_text() if haystack is None else read_text(haystack)
    length_list = [] if lengths is None else numbers("lengths", lengths)
    settings = {
        "suite": suite,
        "model": model,
        "dtype": dtype,
        "weight_dtype": weight_dtype,
        "data": data if data is None or data.startswith(SCHEME) else Path(data).name,
        "haystack": sha256(text.encode()).hexdigest()[:12],
        "parity": parity,
        "mode": mode,
        "seed": seed,
        "max_length": max_length,
    }
    journal = Journal(
        folder,
        settings,
        part,
        facts={"machine": describe_machine(), "versions": describe_versions()},
        command=shlex.join(["rocketkv", *sys.argv[1:]]),
    )
    with journal:
        loaded = load_model(model, dtype, weight_dtype)
        request = Request(
            tokenizer=loaded.tokenizer,
            tasks=[] if tasks is None else tasks.split(","),
            lengths=length_list,
            num_samples=samples,
            seed=seed,
            data=data_path,
            haystack=text,
            parity=parity is not None,
            mode=mode,
        )
        with lasting_bar() as progress:
            task = progress.add_task(suite, total=None)

            def on_progress(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            if chosen is None:
                passages = list(find_passages(request, loaded.context_length))
                fidelity.run(loaded, passages[part.index - 1 :: part.count], arms, journal, on_progress)
            else:
                runner.run(loaded, runner.Plan(chosen, request, arms, max_length, part), journal, on_progress)
    _summarize(journal.records)
    if journal.faults:
        err.print(f"{journal.faults} samples could not be evaluated; see {folder / f'faults{part.suffix}.jsonl'}.")
        raise typer.Exit(1)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `rocketkv eval run` was given as --out.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the report and its plots.")] = Path("report"),
) -> None:
    """Write one report of several runs, with tables, intervals and plots, as Markdown and as one HTML file."""
    from rocketkv.eval.report.write import write_report

    for path in write_report(folders, folder):
        out.print(str(path), soft_wrap=True)


def _shard(text: str) -> "Shard":
    """Return the two numbers of a text like 2/3."""
    from rocketkv.eval.run.journal import Shard

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise InputError(f"shard={text!r} is no part of a whole; give i/n with i from 1 to n, as in 1/3.")
    return Shard(int(index), int(count))


def _summarize(records: Sequence[Mapping[str, Any]]) -> None:
    """Print a short table, and what one prefill for all methods saved."""
    groups: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["method"], record["token_budget"]), []).append(record)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("method", "budget", "score", "agrees with full", "n"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for (method, budget), group in groups.items():
        score = sum(record["scores"]["score"] for record in group) / len(group)
        agreeing = [record["agrees"] for record in group if record["agrees"] is not None]
        share = f"{sum(agreeing) / len(agreeing):.0%}" if agreeing else ""
        table.add_row(method, "" if budget is None else str(budget), f"{100 * score:.1f}", share, str(len(group)))
    out.print(table)
    alone = sum(record["prefill_s"] for record in records)
    spent = sum(record["prefill_s"] / record["rows"] for record in records)
    out.print(f"prefill took {spent:.0f} s; for each method on its own it would have taken {alone:.0f} s.")
