"""What `rocketkv generate` and `rocketkv chat` share: options, the streaming of an answer and the table of its cost."""

import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.progress import TextColumn
from rich.table import Table

from rocketkv.commands.options import Dtype, KvDtype, Model, TokenBudget, WeightDtype, WindowSize
from rocketkv.commands.terminal import out, passing_bar
from rocketkv.errors import InputError

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig
    from rocketkv.hf.session import Answer, Session

System = Annotated[str | None, typer.Option(help="System prompt. Default: the chat template's own.")]
DoSample = Annotated[bool, typer.Option("--do-sample", help="Draw each token instead of taking the likeliest.")]
Temperature = Annotated[
    float | None, typer.Option(help="A value above 1 makes draws more random. Default: the model's.")
]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that together have this probability.")]
TopK = Annotated[int | None, typer.Option(help="Draw from this many of the likeliest tokens; 0 draws from all.")]
Penalty = Annotated[float | None, typer.Option(help="A value above 1 makes tokens that occurred less likely.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the draws: the same seed gives the same answers. Default: a new one.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The largest number of tokens to generate.")]
Fast = Annotated[
    bool, typer.Option("--fast", help="Compile the decode step: the first token takes a minute, in later runs seconds.")
]


@dataclass(frozen=True)
class Setup:
    """Options that choose the model which answers, and how its cache compresses."""

    model: Model = "smollm2"
    token_budget: TokenBudget = 256
    max_new_tokens: MaxNewTokens = 128
    window_size: WindowSize = 32
    dtype: Dtype = "auto"
    kv_dtype: KvDtype = "auto"
    weight_dtype: WeightDtype = None
    fast: Fast = False
    system: System = None

    def config(self, mode: Literal["single_turn", "multi_turn"] = "single_turn") -> "RocketKVConfig":
        """Make the configuration of the cache.

        Raises:
            ConfigError: a value is not allowed, or the budget is smaller than the window.
        """
        from rocketkv.config import RocketKVConfig

        return RocketKVConfig(
            token_budget=self.token_budget,
            window_size=self.window_size,
            kv_dtype=self.kv_dtype,
            mode=mode,
        )


@dataclass(frozen=True)
class Sampling:
    """Options that choose how tokens are drawn: greedily, or as transformers' options of these names say."""

    do_sample: DoSample = False
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    repetition_penalty: Penalty = None
    seed: Seed = None

    def options(self) -> dict[str, Any]:
        """Check the options and name them as `Session` takes them.

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


def ask(
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
    """Show a bar over the layers, and give the function that moves the bar.

    That function raises KeyboardInterrupt between two layers once `stopped` says so.
    """
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


def answer_table(answers: "dict[str, Answer]") -> Table:
    """Return the table of what each cache stored and read, and of how fast each one answered."""
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
