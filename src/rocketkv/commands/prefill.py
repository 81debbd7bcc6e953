"""`rocketkv prefill`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rocketkv.commands.answers import Setup, prefill_bar
from rocketkv.commands.terminal import err, load_model, out, read_text
from rocketkv.errors import InputError

if TYPE_CHECKING:
    from rocketkv.hf import RocketKVCache


def prefill(
    file: Annotated[Path, typer.Option("--file", "-f", help="The document, UTF-8; - for standard input.")],
    to: Annotated[Path, typer.Option("--out", "-o", help="The file to write; it holds the document.")],
    setup: Setup = Setup(),
    single_turn: Annotated[
        bool, typer.Option("--single-turn", help="Keep what stage 1 keeps alone: a small file that knows less.")
    ] = False,
) -> None:
    """Read a document once and save its cache, for `generate --cache` and `chat --cache`."""
    config = setup.config("single_turn" if single_turn else "multi_turn")
    text = read_text(file)
    if to.is_dir() or not os.access(to.absolute().parent, os.W_OK):
        raise InputError(f"--out {to} cannot be written; give a file in a folder that exists and is yours to write.")
    loaded = load_model(setup.model, setup.dtype, setup.weight_dtype, device=setup.device)
    from rocketkv.hf import RocketKVCache
    from rocketkv.hf.session import Session

    session = Session(loaded, config, setup.max_new_tokens, system=setup.system)
    with prefill_bar(None) as on_layer:
        session.read(text, on_layer=on_layer)
    assert isinstance(session.cache, RocketKVCache)
    with err.status(f"writing {to}"):
        session.cache.save(to)
    seen = session.cache.get_seq_length()
    out.print(f"{to}: {seen} tokens, {to.stat().st_size / 2**20:.1f} MiB.", markup=False, soft_wrap=True)
    if single_turn:
        out.print(f"warning: {what_is_gone(session.cache)}", style="yellow", markup=False, soft_wrap=True)


def what_is_gone(cache: "RocketKVCache") -> str:
    """Say what a single_turn cache cannot answer any more."""
    total = cache.stats().total
    return (
        f"of {total.num_seen:.0f} tokens, {total.num_stored:.0f} are left in a layer, chosen by the document's last "
        "words and not by a question; what stands in the others cannot be answered. Without --single-turn the file "
        "keeps all."
    )
