"""The command `rocketkv generate`: one question about a long text."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rocketkv.commands.answers import Sampling, Setup, Source, answer_table, ask
from rocketkv.commands.kept import kept_line
from rocketkv.commands.options import AsJson
from rocketkv.commands.terminal import load_model, out, read_text
from rocketkv.errors import InputError

if TYPE_CHECKING:
    from rocketkv.hf.session import Answer


def generate(
    question: Annotated[str, typer.Option("--question", "-q", help="The question to ask about the text.")],
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", "-f", help="The long text, UTF-8; - for standard input.")
    ] = None,
    source: Source = Source(),
    setup: Setup = Setup(),
    sampling: Sampling = Sampling(),
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the full cache, too.")] = False,
    show_kept: Annotated[
        bool, typer.Option("--show-kept", help="Draw the text as one line, darker where more heads keep its tokens.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question about a long text with a compressed cache."""
    config, options = setup.config(), {"system": setup.system, **sampling.options()}
    source.check(prompt_file, "--prompt-file", setup)
    if compare and prompt_file is None:
        raise InputError("--compare reads the text with the full cache too; give --prompt-file instead of --cache.")
    if show_kept and as_json:
        raise InputError("--show-kept draws for a reader and --json writes for a program; leave one of them out.")
    text = "" if prompt_file is None else read_text(prompt_file)
    loaded = load_model(setup.model, setup.dtype, setup.weight_dtype, fast=setup.fast, device=setup.device)
    from rocketkv.hf.session import Session

    session = Session(loaded, config, setup.max_new_tokens, **options)
    has_begun = source.begin(session, setup, text)
    sessions = {f"RocketKV t={setup.token_budget if session.config is None else session.config.token_budget}": session}
    if compare:
        sessions["full cache"] = Session(loaded, None, setup.max_new_tokens, **options)
    answers: dict[str, Answer] = {}
    for name, session in sessions.items():
        message = question if has_begun and session.config is not None else f"{text}\n\n{question}"
        answers[name] = ask(session, message, title=name, quiet=as_json)
    if as_json:
        records = dict(zip(("rocketkv", "full_cache"), map(_answer_record, answers.values()), strict=False))
        print(json.dumps({"model": setup.model, "token_budget": setup.token_budget, **records}, indent=2))
    else:
        out.print(answer_table(answers))
    if show_kept:
        out.print(kept_line(next(iter(sessions.values())).cache))


def _answer_record(answer: "Answer") -> dict[str, object]:
    """Make the JSON record of an answer: its figures, and those of the cache, in total and per layer."""
    record = asdict(answer)
    record["stats"] = {"total": asdict(answer.stats.total), "layers": [asdict(layer) for layer in answer.stats.layers]}
    return record
