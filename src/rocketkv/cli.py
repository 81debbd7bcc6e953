"""The command line. Thin: it puts the commands together; help imports neither torch nor transformers."""

import io
import os
import sys

import typer

from rocketkv.commands import bench, evaluate
from rocketkv.commands.budget import budget
from rocketkv.commands.info import info
from rocketkv.commands.options import spread
from rocketkv.commands.recommend import recommend
from rocketkv.commands.talk import chat, generate
from rocketkv.commands.terminal import report_errors

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
for _group, _commands in (
    (app, (generate, chat, budget, recommend, info)),
    (eval_app, (evaluate.run, evaluate.report)),
    (bench_app, (bench.attention, bench.decode, bench.prefill, bench.memory)),
):
    for _command in _commands:
        _group.command()(report_errors(spread(_command)))


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before any library imports tqdm: our own bars are enough
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    app()
