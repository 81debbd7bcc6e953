"""The folder for files that can be made again."""

import os
from pathlib import Path

from rocketkv.errors import InputError


def cache_folder() -> Path:
    """Return, and make, the folder for files that can be made again: `rocketkv` in XDG_CACHE_HOME or in ~/.cache.

    Raises:
        InputError: the folder cannot be made.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rocketkv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the cache folder {folder} cannot be made ({error}); set XDG_CACHE_HOME.") from None
    return folder
