"""Fetches data of one pinned revision from the Hugging Face hub, if the user asks for it, into the hub's own cache."""

import re
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download

from rocketkv.errors import InputError

SCHEME = "hf://datasets/"
_SOURCE = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)@(?P<revision>[0-9a-f]{40})(/(?P<path>.+))?")


def locate_data(source: str) -> Path:
    """Return the path of data on this machine; a dataset of the hub is fetched first.

    Args:
        source: a path, or `hf://datasets/OWNER/NAME@REVISION`, with or without a folder or file after it. The revision
            is a commit, 40 hexadecimal digits, so that the same command finds the same data.

    Raises:
        InputError: there is no such path, no such dataset, file or revision, or no way to reach the hub.
    """
    if not source.startswith(SCHEME):
        path = Path(source)
        if not path.exists():
            raise InputError(f"there is no {path}; give the path of a file or folder with the suite's data.")
        return path
    found = _SOURCE.fullmatch(source)
    if found is None:
        raise InputError(
            f"{source!r} names no pinned dataset; give {SCHEME}OWNER/NAME@REVISION with a commit of 40 hexadecimal "
            "digits, which the dataset's page on the hub shows under its files."
        )
    inside = found["path"]
    fetch = partial(
        snapshot_download,
        found["repository"],
        repo_type="dataset",
        revision=found["revision"],
        allow_patterns=None if inside is None else [inside, f"{inside}/*"],
    )
    try:
        folder = Path(fetch())
    except Exception as error:  # the client, its transport and its checks each have errors of their own
        first = str(error).strip().split("\n")[0]
        try:
            folder = Path(fetch(local_files_only=True))  # some versions of the client ask the hub even for cached files
        except Exception:
            raise InputError(
                f"{source} cannot be fetched ({first}); see that it exists and the hub can be reached."
            ) from error
    path = folder if inside is None else folder / inside
    if not path.exists():
        raise InputError(f"{found['repository']} has no {inside!r} at that revision; give a path that it has.")
    return path
