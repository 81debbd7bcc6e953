"""`rocketkv generate` and `rocketkv chat`."""

import json
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.progress import TextColumn
from rich.table import Table

from rocketkv.commands.options import AsJson, Dtype, KvDtype, Model, TokenBudget, Weights, WindowSize
from rocketkv.commands.terminal import (
    STANDARD_INPUT,
    deferring_interrupts,
    load_model,
    out,
    passing_bar,
    print_error,
    read_line,
    read_text,
)
from rocketkv.errors import InputError

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig
    from rocketkv.session import Answer, Session

System = Annotated[str | None, typer.Option(help="System prompt; default: the chat template's own.")]
DoSample = Annotated[bool, typer.Option("--do-sample", help="Draw each token instead of taking the likeliest.")]
Temperature = Annotated[float | None, typer.Option(help="Above 1 flattens what is drawn from; default: the model's.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this probability together.")]
TopK = Annotated[int | None, typer.Option(help="Draw from this many of the likeliest tokens; 0: from all.")]
Penalty = Annotated[float | None, typer.Option(help="Above 1 makes tokens that occurred less likely.")]
Seed = Annotated[int | None, typer.Option(help="Of what is drawn: the same seed, the same answers. Default: another.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Fast = Annotated[
    bool, typer.Option("--fast", help="Compile the decode step: its first token takes a minute, seconds in later runs.")
]


@dataclass(frozen=True)
class Setup:
    """What answers, and how its cache is compressed."""

    model: Model = "smollm2"
    token_budget: TokenBudget = 256
    max_new_tokens: MaxNewTokens = 128
    window_size: WindowSize = 32
    dtype: Dtype = "auto"
    kv_dtype: KvDtype = "auto"
    weights: Weights = None
    fast: Fast = False
    system: System = None

    def config(self, mode: str = "single_turn") -> "RocketKVConfig":
        """How the cache compresses."""
        from rocketkv.config import RocketKVConfig

        options: dict[str, Any] = {"window_size": self.window_size, "kv_dtype": self.kv_dtype, "mode": mode}
        return RocketKVConfig(token_budget=self.token_budget, **options)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily, or as transformers' options of these names say."""

    do_sample: DoSample = False
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    repetition_penalty: Penalty = None
    seed: Seed = None

    def options(self) -> dict[str, Any]:
        """What a `Session` takes.

        Raises:
            InputError: an option is out of its range, or has no effect since nothing is drawn.
        """
        ranges = {
            "temperature": (0 < (self.temperature or math.nan) < math.inf, "a number above 0"),
            "top_p": (0 < (self.top_p or math.nan) <= 1, "a number above 0 and at most 1"),
            "top_k": ((self.top_k or 0) >= 0, "0 or more"),
            "repetition_penalty": (0 < (self.repetition_penalty or math.nan) < math.inf, "a number above 0"),
            "seed": (0 <= (self.seed or 0) < 2**63, "a whole number from 0 up to 2**63 - 1"),
        }
        given = {name: getattr(self, name) for name in ranges if getattr(self, name) is not None}
        for name, value in given.items():
            fits, allowed = ranges[name]
            option = "--" + name.replace("_", "-")
            if not fits:
                raise InputError(f"{option} {value} is out of range; give {allowed}.")
            if not self.do_sample and name != "repetition_penalty":
                raise InputError(f"{option} {value} has no effect on greedy answers; add --do-sample or leave it out.")
        seed = given.pop("seed", secrets.randbits(32)) if self.do_sample else None
        return {"sampling": {"do_sample": self.do_sample, **given}, "seed": seed}


def generate(
    prompt_file: Annotated[
        Path, typer.Option("--prompt-file", "-f", help="The long text, UTF-8; - for standard input.")
    ],
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask about it.")],
    setup: Setup = Setup(),
    sampling: Sampling = Sampling(),
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the full cache too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question about a long text with a compressed cache."""
    config, options = setup.config(), {"system": setup.system, **sampling.options()}
    text = read_text(prompt_file)
    loaded = load_model(setup.model, setup.dtype, setup.weights, fast=setup.fast)
    from rocketkv.session import Session

    sessions = {f"RocketKV t={setup.token_budget}": Session(loaded, config, setup.max_new_tokens, **options)}
    if compare:
        sessions["full cache"] = Session(loaded, None, setup.max_new_tokens, **options)
    answers: dict[str, Answer] = {}
    for name, session in sessions.items():
        answers[name] = _ask(session, f"{text}\n\n{question}", title=name, quiet=as_json)
    if as_json:
        records = dict(zip(("rocketkv", "full_cache"), map(_answer_record, answers.values()), strict=False))
        print(json.dumps({"model": setup.model, "token_budget": setup.token_budget, **records}, indent=2))
    else:
        out.print(_answer_table(answers))


def chat(
    file: Annotated[Path, typer.Option("--file", "-f", help="The document to talk about, UTF-8.")],
    setup: Setup = Setup(),
    sampling: Sampling = Sampling(),
) -> None:
    """Talk about a document over several turns (multi-turn cache). /stats, /reset and /quit do what they say.

    Ctrl-C ends an answer; where nothing is being answered, it ends the program.
    """
    if file == STANDARD_INPUT:
        raise InputError("chat reads your questions from standard input, so --file - is taken; give a file instead.")
    config, options = setup.config("multi_turn"), {"system": setup.system, **sampling.options()}
    text = read_text(file)
    loaded = load_model(setup.model, setup.dtype, setup.weights, fast=setup.fast)
    from rocketkv.session import Session

    session = Session(loaded, config, setup.max_new_tokens, **options)
    answer: Answer | None = None
    out.print(f"Ask about {file.name}. /stats, /reset, /quit.", style="dim")
    while True:
        message = read_line("[bold]> [/]")
        if message in (None, "/quit"):
            break
        if message == "/reset":
            session.reset()
            answer = None
            out.print("The conversation is forgotten; the document stays.", style="dim")
        elif message == "/stats":
            out.print(
                _answer_table({f"RocketKV-MT t={setup.token_budget}": answer}) if answer else "Nothing was asked yet."
            )
        elif message.startswith("/"):
            out.print(f"There is no command {message}; /stats, /reset and /quit exist.", style="red", markup=False)
        elif message:
            asked = message if session.messages else f"{text}\n\n{message}"
            try:
                with deferring_interrupts() as stopped:
                    answer = _ask(session, asked, title=None, quiet=False, stopped=stopped)
                if stopped():
                    out.print("Interrupted: the answer ends here, and stays in the conversation as it is.", style="dim")
            except KeyboardInterrupt:
                answer = None
                out.print(
                    "Interrupted before the answer began: the conversation is forgotten; the document stays.",
                    style="dim",
                )
            except InputError as error:
                print_error(error)


def _ask(
    session: "Session", message: str, *, title: str | None, quiet: bool, stopped: Callable[[], bool] | None = None
) -> "Answer":
    """Send a message with a bar for the prefill, and stream the answer; see `deferring_interrupts` for `stopped`."""

    def on_text(text: str) -> None:
        out.print(text, end="", markup=False, soft_wrap=True)
        out.file.flush()

    if title and not quiet:
        out.print(title, style="bold")
    with _prefill_bar(stopped) as on_layer:
        answer = session.send(message, on_layer=on_layer, on_text=None if quiet else on_text, stopped=stopped)
    if not quiet:
        out.print()
    return answer


@contextmanager
def _prefill_bar(stopped: Callable[[], bool] | None) -> Iterator[Callable[[int, int], None]]:
    """A bar over the layers, and what tells it of them; a prefill that is stopped is interrupted between two."""
    progress = passing_bar(TextColumn("layers"))
    task = progress.add_task("prefill", total=None)

    def on_layer(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)
        if stopped is not None and stopped() and done < total:
            raise KeyboardInterrupt
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
