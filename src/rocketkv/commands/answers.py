"""What `rocketkv generate` and `rocketkv chat` share: options, the streaming of an answer and the table of its cost."""

import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.progress import TextColumn
from rich.table import Table

from rocketkv.commands.options import Device, Dtype, KvDtype, Model, TokenBudget, WeightDtype, WindowSize
from rocketkv.commands.terminal import out, passing_bar
from rocketkv.errors import InputError

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig
    from rocketkv.hf.session import Answer, Session

System = Annotated[str | None, typer.Option(help="System prompt. Default: the chat template's own.")]
DoSample = Annotated[
    bool,
    typer.Option("--do-sample", help="Draw each token instead of taking the likeliest; options of the draws imply it."),
]
Temperature = Annotated[
    float | None, typer.Option(help="A value above 1 makes draws more random. Default: the model's.")
]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that together have this probability.")]
TopK = Annotated[int | None, typer.Option(help="Draw from this many of the likeliest tokens; 0 draws from all.")]
MinP = Annotated[
    float | None, typer.Option(help="Draw from tokens with at least this share of the likeliest one's probability.")
]
Penalty = Annotated[float | None, typer.Option(help="A value above 1 makes tokens that occurred less likely.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the draws: the same seed gives the same answers. Default: a new one.")
]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", help="A file of `rocketkv prefill` to begin with, instead of a text."),
]
Store = Annotated[
    bool, typer.Option("--store", help="Keep what was read for the next time; `rocketkv store` shows where it lies.")
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
    device: Device = "cpu"
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
class Source:
    """Options that say where a document's cache comes from, beside its text.

    Attributes:
        cache: the file of a saved cache, which takes the place of the text.
        store: whether the text is looked for in the store, and put there.
    """

    cache: Cache = None
    store: Store = False

    def check(self, file: Path | None, option: str, setup: Setup) -> None:
        """Refuse options that contradict each other.

        Raises:
            InputError: there is no document, or there are two; or an option of `setup` is one of the saved cache.
        """
        if (file is None) == (self.cache is None):
            wanted = "give one of them" if file is None else "leave one of them out"
            raise InputError(f"{option} is the text and --cache what was read of one before; {wanted}.")
        if self.cache is not None and self.store:
            raise InputError("--cache and --store both say where what was read lies; leave one of them out.")
        if self.cache is not None and setup.system is not None:
            raise InputError("the system prompt is part of a saved cache; give --system to `rocketkv prefill`.")

    def begin(self, session: "Session", setup: Setup, text: str) -> bool:
        """Let a new session begin with the document, if it comes from a file or from the store; return whether.

        Raises:
            CacheFileError: the file cannot be used.
            InputError: an option of `setup` contradicts the file.
        """
        if self.cache is not None:
            from rocketkv.hf import RocketKVCache

            cache = RocketKVCache.load(self.cache, session.loaded.model)
            for name in ("token_budget", "window_size", "kv_dtype"):
                given, saved = getattr(setup, name), getattr(cache.config, name)
                if given not in (saved, getattr(Setup, name)):
                    option = "--" + name.replace("_", "-")
                    raise InputError(f"{option} {given} is not what {self.cache} was made with, {saved}; leave it out.")
            session.resume(cache)
            return True
        if self.store:
            from rocketkv.hf.shelf import default_folder
            from rocketkv.hf.store import PrefixStore

            store = PrefixStore(session.loaded.model, setup.config("multi_turn"), folder=default_folder())
            with prefill_bar(None) as on_layer:
                session.read(text, store=store, on_layer=on_layer)
            return True
        return False


@dataclass(frozen=True)
class Sampling:
    """Options that choose how tokens are drawn: greedily, or as transformers' options of these names say."""

    do_sample: DoSample = False
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    repetition_penalty: Penalty = None
    seed: Seed = None

    def options(self) -> dict[str, Any]:
        """Check the options and name them as `Session` takes them.

        Raises:
            InputError: an option is out of its range.
        """
        ranges = {
            "temperature": (0 < (self.temperature or math.nan) < math.inf, "a number above 0"),
            "top_p": (0 < (self.top_p or math.nan) <= 1, "a number above 0 and at most 1"),
            "top_k": ((self.top_k or 0) >= 0, "0 or more"),
            "min_p": (0 <= (self.min_p or 0) <= 1, "a number from 0 to 1"),
            "repetition_penalty": (0 < (self.repetition_penalty or math.nan) < math.inf, "a number above 0"),
            "seed": (0 <= (self.seed or 0) < 2**63, "a whole number from 0 up to 2**63 - 1"),
        }
        given = {name: getattr(self, name) for name in ranges if getattr(self, name) is not None}
        for name, value in given.items():
            fits, allowed = ranges[name]
            if not fits:
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} {value} is out of range; give {allowed}.")
        draws = self.do_sample or not given.keys() <= {"repetition_penalty"}
        seed = given.pop("seed", secrets.randbits(32)) if draws else None
        return {"sampling": {"do_sample": draws, **given}, "seed": seed}


def ask(
    session: "Session", message: str, *, title: str | None, quiet: bool, stopped: Callable[[], bool] | None = None
) -> "Answer":
    """Send a message with a bar for the prefill, and stream the answer; see `deferring_interrupts` for `stopped`."""

    def on_text(text: str) -> None:
        out.print(text, end="", markup=False, soft_wrap=True)
        out.file.flush()

    if title and not quiet:
        out.print(title, style="bold")
    with prefill_bar(stopped) as on_layer:
        answer = session.send(message, on_layer=on_layer, on_text=None if quiet else on_text, stopped=stopped)
    if not quiet:
        out.print()
    return answer


@contextmanager
def prefill_bar(stopped: Callable[[], bool] | None) -> Iterator[Callable[[int, int], None]]:
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
