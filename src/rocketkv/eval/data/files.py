"""Reads objects from data files: .jsonl, .jsonl.gz, .json and .parquet, alone, in a folder or in a .zip.

All parquet files of the hub have names like `test-...`, so their folder names their content.
"""

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

from rocketkv.errors import InputError

PARQUET = ".parquet"
SPLITS = ("test-", "train-", "validation-")  # the pattern of names of the hub's parquet files
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", PARQUET)


@dataclass(frozen=True)
class Item:
    """The object of one line of a .jsonl file, or one element of a .json file.

    Attributes:
        source: the file, and the line or element of it.
        value: the object; None if the line has no valid object.
        reason: the reason why there is no object.
    """

    source: str
    value: dict[str, Any] | None
    reason: str = ""


@dataclass(frozen=True)
class DataFile:
    """A file of JSON objects, or the member of a .zip that is one."""

    path: Path
    member: str = ""

    @property
    def name(self) -> str:
        """The name of the file in messages."""
        if self.path.name.startswith(SPLITS):
            return f"{self.path.parent.name}/{self.path.name}"
        return f"{self.path.name}:{self.member}" if self.member else self.path.name

    @property
    def stem(self) -> str:
        """The name without folder and suffixes; for parquet that of its folder, which names the task."""
        path = Path(self.member or self.path)
        name = path.name
        if name.endswith(PARQUET) and name.startswith(SPLITS):
            return path.parent.name
        return next(name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix))

    def items(self) -> Iterator[Item]:
        """Yield the file's objects in order; blank lines of a .jsonl file are passed over.

        Raises:
            InputError: the file cannot be read, or is no file of its suffix, or pyarrow is missing for a .parquet.
        """
        try:
            with self._open() as file:
                if (self.member or self.path.name).endswith(PARQUET):
                    yield from self._rows(file)
                elif (self.member or self.path.name).endswith(".json"):
                    yield from self._elements(file)
                else:
                    yield from self._lines(file)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path} cannot be read ({error}); give another file.") from None

    def _open(self) -> BufferedIOBase:
        """Return the file's bytes, unpacked."""
        if self.member:
            with zipfile.ZipFile(self.path) as archive:
                data = archive.read(self.member)
            return BytesIO(gzip.decompress(data) if self.member.endswith(".gz") else data)
        return gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb")

    def _lines(self, file: BufferedIOBase) -> Iterator[Item]:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield self._parse(f"{self.name}, line {number}", line)

    def _elements(self, file: BufferedIOBase) -> Iterator[Item]:
        try:
            elements = json.load(file)
        except ValueError as error:
            raise InputError(f"{self.path} is no JSON ({error}); give another file.") from None
        if not isinstance(elements, list):
            raise InputError(f"{self.path} holds no list of objects; give a .json file with a list, or .jsonl.")
        for number, element in enumerate(elements, 1):
            yield self._object(f"{self.name}, element {number}", element)

    def _rows(self, file: BufferedIOBase) -> Iterator[Item]:
        try:
            from pyarrow import ArrowInvalid
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise InputError(f"reading {self.name} needs pyarrow; run `pip install pyarrow`.") from None
        try:
            batches = ParquetFile(file).iter_batches(batch_size=16)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield self._object(f"{self.name}, row {number}", row)
        except ArrowInvalid as error:
            raise InputError(f"{self.path} is no parquet ({error}); give another file.") from None

    def _parse(self, source: str, line: bytes) -> Item:
        try:
            return self._object(source, json.loads(line))
        except ValueError as error:
            return Item(source, None, f"is no JSON: {error}")

    def _object(self, source: str, value: Any) -> Item:
        if isinstance(value, dict):
            return Item(source, value)
        return Item(source, None, f"is {type(value).__name__} where an object is expected")


def find_files(path: Path) -> list[DataFile]:
    """Return the files of objects: in a folder, with the parquet of the hub's folders in it, in a .zip, or `path`.

    Raises:
        InputError: there is no such file or folder, or it is or holds none of the kinds that can be read.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; give a file or a folder.")
    if path.is_dir():
        files = [DataFile(file) for file in _inside(path) if file.is_file() and _readable(file.name)]
    elif path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                files = [DataFile(path, member) for member in sorted(archive.namelist()) if _readable(member)]
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is no .zip file ({error}); give another file.") from None
    else:
        files = [DataFile(path)] if _readable(path.name) else []
    if not files:
        raise InputError(f"{path} is or holds no {', '.join(SUFFIXES)} file; give one, or a folder or .zip with some.")
    return files


def by_stem(files: Iterable[DataFile]) -> dict[str, DataFile]:
    """Return each file by its stem.

    Raises:
        InputError: two files have the same stem.
    """
    found: dict[str, DataFile] = {}
    for file in files:
        if file.stem in found:
            raise InputError(f"{found[file.stem].name} and {file.name} are both {file.stem}; give one of them alone.")
        found[file.stem] = file
    return found


def _inside(folder: Path) -> list[Path]:
    """List what lies in a folder, and, where that is one of the hub's, in the folders of its tasks."""
    return sorted([*folder.iterdir(), *(path for split in SPLITS for path in folder.glob(f"*/{split}*{PARQUET}"))])


def _readable(name: str) -> bool:
    return name.endswith(SUFFIXES) and not Path(name).name.startswith(".")
