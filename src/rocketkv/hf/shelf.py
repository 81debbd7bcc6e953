"""Where saved caches are kept, the least recently used of them given up first: a folder, or the process's memory."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryFile
from time import time_ns
from typing import Any, BinaryIO

from torch import Tensor

from rocketkv import tensor_file
from rocketkv.errors import InputError, OutOfMemoryError
from rocketkv.folders import cache_folder
from rocketkv.tensor_file import Rows

SUFFIX = ".kv"
NAME = re.compile(rf"[0-9a-f]{{16}}-[0-9a-f]{{32}}{re.escape(SUFFIX)}")  # other files in a folder are not the store's


def default_folder() -> Path:
    """Return the folder of `--store`: `store` in the cache folder."""
    return cache_folder() / "store"


class Shelf(ABC):
    """Files of saved caches by name.

    Args:
        max_bytes: what the files may take together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes

    @abstractmethod
    def paths(self) -> dict[str, Path]:
        """Return the path of each file by its name, the most recently used first."""

    @abstractmethod
    def touch(self, name: str) -> bool:
        """Count a file as used now; return whether it is there."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Give a file up, if it is there; caches that were made of it stay whole."""

    @abstractmethod
    def write(self, name: str, tensors: Mapping[str, Tensor | Rows], record: Mapping[str, Any]) -> None:
        """Write a file, whole or not at all."""

    def add(self, name: str, tensors: Mapping[str, Tensor | Rows], record: Mapping[str, Any]) -> bool:
        """Give up the least recently used files until a new one fits, and write it; return whether it fits, too."""
        needed = sum(tensor.nbytes for tensor in tensors.values())
        if needed > self.max_bytes:
            return False
        self._shrink(self.max_bytes - needed)
        self.write(name, tensors, record)
        given_up = self._shrink(self.max_bytes)  # headers take room, and other processes write as well
        return name not in given_up

    def _shrink(self, max_bytes: int) -> list[str]:
        """Give up the least recently used files until the others take at most `max_bytes`; return their names."""
        sizes, given_up = self.sizes(), []
        while sum(sizes.values()) > max_bytes:
            last, _ = sizes.popitem()
            self.remove(last)
            given_up.append(last)
        return given_up

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file by its name, the most recently used first."""
        sizes = {}
        for name, path in self.paths().items():
            with suppress(OSError):  # another process has given it up
                sizes[name] = path.stat().st_size
        return sizes

    def clear(self) -> None:
        """Give up all files."""
        for name in self.paths():
            self.remove(name)


class Folder(Shelf):
    """Files in a folder, which several processes may share: each file is there whole or not at all.

    Args:
        path: the folder, made with mode 0700 if it is not there.
        max_bytes: what the files may take together.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder {path} cannot be made ({error.strerror}); give another one.") from None

    def paths(self) -> dict[str, Path]:
        """See `Shelf`; a file was used when it was last modified."""
        used = {}
        for path in self.path.glob(f"*{SUFFIX}"):
            with suppress(OSError):
                if NAME.fullmatch(path.name):
                    used[path] = path.stat().st_mtime_ns
        return {path.name: path for path in sorted(used, key=lambda path: used[path], reverse=True)}

    def touch(self, name: str) -> bool:
        """See `Shelf`; the time is this process's, because a file system's own counts in steps of milliseconds."""
        now = time_ns()
        with suppress(OSError):
            os.utime(self.path / name, ns=(now, now))
            return True
        return False

    def remove(self, name: str) -> None:
        """See `Shelf`."""
        with suppress(OSError):  # the folder may be another's to write
            (self.path / name).unlink(missing_ok=True)

    def write(self, name: str, tensors: Mapping[str, Tensor | Rows], record: Mapping[str, Any]) -> None:
        """See `Shelf`; what processes that were killed have left half written goes."""
        self._sweep()
        tensor_file.save(self.path / name, tensors, record)
        self.touch(name)

    def clear(self) -> None:
        """See `Shelf`; what processes that were killed have left half written goes, too."""
        super().clear()
        self._sweep()

    def half_written(self) -> dict[Path, int]:
        """Return what processes that were killed have left half written, with the bytes of each file."""
        return tensor_file.half_written(self.path, NAME)

    def _sweep(self) -> None:
        for path in self.half_written():
            with suppress(OSError):
                path.unlink()


class Memory(Shelf):
    """Files in the memory of this process; where the system has no such files, unnamed ones on disk.

    Args:
        max_bytes: what the files may take together.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._files: dict[str, BinaryIO] = {}  # the least recently used first

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    def paths(self) -> dict[str, Path]:
        """See `Shelf`."""
        return {name: Path(f"/dev/fd/{file.fileno()}") for name, file in reversed(self._files.items())}

    def touch(self, name: str) -> bool:
        """See `Shelf`."""
        if name not in self._files:
            return False
        self._files[name] = self._files.pop(name)
        return True

    def remove(self, name: str) -> None:
        """See `Shelf`."""
        if name in self._files:
            self._files.pop(name).close()

    def write(self, name: str, tensors: Mapping[str, Tensor | Rows], record: Mapping[str, Any]) -> None:
        """See `Shelf`.

        Raises:
            OutOfMemoryError: the system has no room for the file.
        """
        try:
            with ExitStack() as opened:
                file = opened.enter_context(_new_file(name))
                tensor_file.write(file, tensors, record)
                file.flush()
                opened.pop_all()  # the file stays open as long as its entry lives
        except OSError as error:
            raise OutOfMemoryError(
                f"a cache cannot be kept in memory ({error.strerror}); lower the store's max_bytes or give it a folder."
            ) from None
        self.remove(name)
        self._files[name] = file


def _new_file(name: str) -> BinaryIO:
    """Return an empty file in memory, or without a name on disk where the system has none in memory."""
    return os.fdopen(os.memfd_create(name), "w+b") if hasattr(os, "memfd_create") else TemporaryFile()
