"""The commands of `rocketkv store`: what `--store` has kept."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from rich import box
from rich.table import Table

from rocketkv.commands.options import AsJson
from rocketkv.commands.terminal import out


def show(as_json: AsJson = False) -> None:
    """List the stored caches, the most recently used first."""
    from rocketkv import tensor_file
    from rocketkv.errors import CacheFileError
    from rocketkv.hf.shelf import Folder, default_folder

    folder = Folder(default_folder(), 0)
    rows = []
    for name, path in folder.paths().items():
        try:
            record, tensors = tensor_file.load(path, check=False)
            status = path.stat()
        except (CacheFileError, OSError):  # another process has given it up, or it is damaged and goes when it is met
            continue
        rows.append(
            {
                "name": name,
                "model": record["model"]["name"],
                "dtype": record["model"]["dtype"],
                "tokens": tensors["ids"].shape[1],
                "bytes": status.st_size,
                "used": datetime.fromtimestamp(status.st_mtime).isoformat(" ", "seconds"),
            }
        )
    if as_json:
        print(json.dumps({"folder": str(folder.path), "caches": rows}, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("name", min_width=max((len(row["name"]) for row in rows), default=0))  # whole, to be copied
    for column in ("model", "tokens", "MiB", "last used"):
        table.add_column(column, justify="right" if column in ("tokens", "MiB") else "left")
    for row in rows:
        table.add_row(row["name"], row["model"], str(row["tokens"]), f"{row['bytes'] / 2**20:.1f}", row["used"])
    out.print(table if rows else f"There are no stored caches in {folder.path}.", soft_wrap=True)


def size(as_json: AsJson = False) -> None:
    """Measure the stored caches."""
    from rocketkv.hf.shelf import Folder, default_folder

    folder = Folder(default_folder(), 0)
    whole, half = folder.sizes(), folder.half_written()
    if as_json:
        num_bytes = {"bytes": sum(whole.values()), "half_written_bytes": sum(half.values())}
        print(json.dumps({"folder": str(folder.path), "caches": len(whole), **num_bytes}))
        return
    out.print(f"{_counted(whole, half)} in {folder.path}.", soft_wrap=True)


def clear() -> None:
    """Delete the stored caches, and what killed processes have left half written."""
    from rocketkv.hf.shelf import Folder, default_folder

    folder = Folder(default_folder(), 0)
    counted = _counted(folder.sizes(), folder.half_written())
    folder.clear()
    out.print(f"{counted} deleted from {folder.path}.", soft_wrap=True)


def _counted(whole: Mapping[str, int], half: Mapping[Path, int]) -> str:
    """Say how many caches there are, how many half-written files, if any, and how much they take together."""
    files = f"{len(whole)} caches" + (f" and {len(half)} half-written files" if half else "")
    return f"{files}, {(sum(whole.values()) + sum(half.values())) / 2**20:.1f} MiB"
