"""The command `rocketkv chat`: a conversation about a document."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rocketkv.commands.answers import Sampling, Setup, Source, answer_table, ask
from rocketkv.commands.terminal import (
    STANDARD_INPUT,
    deferring_interrupts,
    load_model,
    out,
    print_error,
    read_line,
    read_text,
)
from rocketkv.errors import InputError

if TYPE_CHECKING:
    from rocketkv.hf.session import Answer


def chat(
    file: Annotated[Path | None, typer.Option("--file", "-f", help="The document to talk about, UTF-8.")] = None,
    source: Source = Source(),
    setup: Setup = Setup(),
    sampling: Sampling = Sampling(),
) -> None:
    """Talk about a document over several turns, with a multi-turn cache.

    /stats prints what the cache stores and reads, /reset forgets the conversation, and /quit ends the program.
    Ctrl-C ends an answer; while nothing is being answered, Ctrl-C ends the program.
    In a terminal the arrow keys edit the line and bring back earlier ones.
    """
    if file == STANDARD_INPUT:
        raise InputError("chat reads your questions from standard input, so --file cannot be -; give a file instead.")
    source.check(file, "--file", setup)
    config, options = setup.config("multi_turn"), {"system": setup.system, **sampling.options()}
    text = "" if file is None else read_text(file)
    loaded = load_model(setup.model, setup.dtype, setup.weight_dtype, fast=setup.fast, device=setup.device)
    from rocketkv.hf.session import Session

    session = Session(loaded, config, setup.max_new_tokens, **options)
    has_begun = source.begin(session, setup, text)
    answer: Answer | None = None
    name = (file or source.cache or Path()).name
    out.print(f"Ask about {name}. Commands: /stats, /reset, /quit.", style="dim")
    while True:
        message = read_line("> ")
        if message in (None, "/quit"):
            break
        if message == "/reset":
            session.reset()
            answer = None
            out.print("The conversation is forgotten; the document stays.", style="dim")
        elif message == "/stats":
            out.print(
                answer_table({f"RocketKV-MT t={setup.token_budget}": answer}) if answer else "Nothing was asked yet."
            )
        elif message.startswith("/"):
            out.print(f"There is no command {message}; /stats, /reset and /quit exist.", style="red", markup=False)
        elif message:
            if has_begun and session.cache.get_seq_length() == 0:  # the conversation was forgotten
                source.begin(session, setup, text)
            asked = message if has_begun or session.messages else f"{text}\n\n{message}"
            try:
                with deferring_interrupts() as stopped:
                    answer = ask(session, asked, title=None, quiet=False, stopped=stopped)
                if stopped():
                    out.print(
                        "Interrupted: the answer ends here; what was answered stays in the conversation.", style="dim"
                    )
            except KeyboardInterrupt:
                answer = None
                out.print(
                    "Interrupted before the answer began: the conversation is forgotten; the document stays.",
                    style="dim",
                )
            except InputError as error:
                print_error(error)
