"""The command line, put together from the commands; its help imports neither torch nor transformers."""

import io
import os
import sys
import warnings
from typing import Annotated

import typer

from rocketkv import __version__
from rocketkv.commands import bench, evaluate, memory, reuse, store
from rocketkv.commands.budget import budget
from rocketkv.commands.chat import chat
from rocketkv.commands.generate import generate
from rocketkv.commands.info import info
from rocketkv.commands.models import models
from rocketkv.commands.options import expand_options
from rocketkv.commands.prefill import prefill
from rocketkv.commands.recommend import recommend
from rocketkv.commands.terminal import explain, print_error, report_errors, show_warning
from rocketkv.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rocketkv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """RocketKV: long-context decoding at a fraction of the KV cache."""


eval_app = typer.Typer(help="Measure accuracy.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")
bench_app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
store_app = typer.Typer(help="Look at what --store has kept, and delete it.", no_args_is_help=True)
app.add_typer(store_app, name="store")
for _group, _commands in (
    (app, (generate, chat, prefill, budget, recommend, models, info)),
    (eval_app, (evaluate.run, evaluate.report)),
    (bench_app, (bench.attention, bench.decode, bench.prefill, bench.capacity, reuse.reuse, memory.memory)),
    (store_app, (store.size, store.clear)),
):
    for _command in _commands:
        _group.command()(report_errors(expand_options(_command)))
store_app.command("list")(report_errors(expand_options(store.show)))


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # set before any library imports tqdm, because we show our own bars
    warnings.showwarning = show_warning
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    if sys.stdout is None:
        print_error(InputError("standard output is closed; leave it open, or send it to a file or to /dev/null."))
        sys.exit(2)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # flush here, where an error can still be reported
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more when it ends
        if isinstance(error, BrokenPipeError):  # the reader has closed the pipe, as `head` does
            sys.exit(1)
        print_error(explain(error))
        sys.exit(2)
