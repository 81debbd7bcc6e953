"""The command `rocketkv generate`: one question about a long text."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rocketkv.commands.answers import Sampling, Setup, answer_table, ask
from rocketkv.commands.options import AsJson
from rocketkv.commands.terminal import load_model, out, read_text

if TYPE_CHECKING:
    from rocketkv.hf.session import Answer


def generate(
    prompt_file: Annotated[
        Path, typer.Option("--prompt-file", "-f", help="The long text, UTF-8; - for standard input.")
    ],
    question: Annotated[str, typer.Option("--question", "-q", help="The question to ask about the text.")],
    setup: Setup = Setup(),
    sampling: Sampling = Sampling(),
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the full cache, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question about a long text with a compressed cache."""
    config, options = setup.config(), {"system": setup.system, **sampling.options()}
    text = read_text(prompt_file)
    loaded = load_model(setup.model, setup.dtype, setup.weight_dtype, fast=setup.fast)
    from rocketkv.hf.session import Session

    sessions = {f"RocketKV t={setup.token_budget}": Session(loaded, config, setup.max_new_tokens, **options)}
    if compare:
        sessions["full cache"] = Session(loaded, None, setup.max_new_tokens, **options)
    answers: dict[str, Answer] = {}
    for name, session in sessions.items():
        answers[name] = ask(session, f"{text}\n\n{question}", title=name, quiet=as_json)
    if as_json:
        records = dict(zip(("rocketkv", "full_cache"), map(_answer_record, answers.values()), strict=False))
        print(json.dumps({"model": setup.model, "token_budget": setup.token_budget, **records}, indent=2))
    else:
        out.print(answer_table(answers))


def _answer_record(answer: "Answer") -> dict[str, object]:
    """Make the JSON record of an answer: its figures, and those of the cache, in total and per layer."""
    record = asdict(answer)
    record["stats"] = {"total": asdict(answer.stats.total), "layers": [asdict(layer) for layer in answer.stats.layers]}
    return record
