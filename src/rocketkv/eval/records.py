"""The folder that a run fills: what was run, every answer, every fault. A run that was killed goes on where it stopped.

run.json: the settings of the run, the machine, versions and commands. records.jsonl: one object per sample, method,
budget and turn. faults.jsonl: what could not be evaluated, of the last run. Shard i of n has `-i-of-n` in the names of
the latter two.
"""

import fcntl
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from rocketkv.errors import InputError
from rocketkv.eval.methods import Arm
from rocketkv.eval.rows import Fault

Record = dict[str, Any]


@dataclass(frozen=True)
class Shard:
    """Part `index`, from 1, of `count`; every `count`-th sample."""

    index: int = 1
    count: int = 1

    @property
    def suffix(self) -> str:
        """What stands in the names of its files."""
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"


class Case(NamedTuple):
    """One sample of a run."""

    task: str
    id: str
    length: int | None


class Journal:
    """The files of a run, open for more; `with` it, so that no other run writes to them meanwhile.

    Args:
        folder: where they lie; made if it does not exist.
        settings: what all runs into this folder must agree on, by name of the option.
        shard: of all samples.
        facts: what else to note in run.json when it is new.
        command: how this run was called.

    Attributes:
        records: all answers so far, those of other shards included.
        faults: how many of this run.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], shard: Shard, *, facts: Mapping[str, Any], command: str
    ) -> None:
        self._folder, self._settings, self._facts, self._command = folder, settings, facts, command
        self._path = folder / f"records{shard.suffix}.jsonl"
        self._faults_path = folder / f"faults{shard.suffix}.jsonl"
        self.records: list[Record] = []
        self.faults = 0
        self._by_case: dict[Case, list[Record]] = {}

    def __enter__(self) -> Self:
        """Open the files and drop what a killed run left torn.

        Raises:
            InputError: the folder cannot be used, holds another run, is being written to, or is damaged.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
        except OSError as error:
            raise InputError(f"{self._folder} cannot be used ({error.strerror}); give another --out.") from None
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise
        return self

    def _open(self) -> None:
        """See that the files are ours to write to, and read them."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self._path} is being written to by another run; wait for it or give another --out."
            ) from None
        self._check_settings()
        own = _read(self._path)
        whole = _whole(own)
        if len(whole) < len(own) or self._path.read_bytes()[-1:] not in (b"", b"\n"):
            self._file.truncate(0)
            self._write(whole)
        self._faults_path.write_text("")
        others = [path for path in find_records(self._folder) if path != self._path]
        self.records = whole + read_records(others)
        for record in self.records:
            self._by_case.setdefault(_case(record), []).append(record)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files, which lets other runs at them."""
        self._file.close()

    def of(self, case: Case) -> list[Record]:
        """The answers to a sample so far."""
        return self._by_case.get(case, [])

    def missing(self, case: Case, arms: Sequence[Arm], prompt: str) -> list[Arm]:
        """Which of `arms` have not answered a sample, whose prompt has the digest `prompt`.

        Raises:
            InputError: it was another prompt when others answered it.
        """
        if any(record["prompt"] != prompt for record in self.of(case)):
            raise InputError(
                f"{case.task}, {case.id} is another prompt than in an earlier run into this folder, so its answers do "
                "not compare; give another --out, or the same data and number of samples."
            )
        done = {(record["method"], record["token_budget"]) for record in self.of(case)}
        return [arm for arm in arms if (arm.method, arm.token_budget) not in done]

    def append(self, records: Sequence[Record]) -> None:
        """Add the answers to one sample, all of them or, if the process dies meanwhile, none."""
        self._write(records)
        self.records += records
        for record in records:
            self._by_case.setdefault(_case(record), []).append(record)

    def note_fault(self, fault: Fault) -> None:
        """Add what could not be evaluated."""
        self.faults += 1
        with self._faults_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(fault), ensure_ascii=False) + "\n")

    def _write(self, records: Iterable[Record]) -> None:
        """One write and one wait for the disk."""
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check_settings(self) -> None:
        """See that earlier runs into this folder had the same settings, or note them if there were none."""
        path = self._folder / "run.json"
        known = {**self._settings, **self._facts, "commands": []}
        if path.exists():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
                differing = [name for name, value in self._settings.items() if known[name] != value]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path} does not describe a run; give another --out.") from None
            if differing:
                name = differing[0]
                raise InputError(
                    f"{self._folder} holds a run with {name}={known[name]!r}, not {self._settings[name]!r}; "
                    "give another --out, or the same settings to go on."
                )
        if self._command not in known["commands"]:
            known["commands"].append(self._command)
            new = path.with_name(f"{path.name}.{os.getpid()}")
            new.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            new.replace(path)


def digest(prompt: object) -> str:
    """A few letters that tell one prompt, in token ids, from another."""
    return sha256(json.dumps(prompt).encode()).hexdigest()[:12]


def find_records(folder: Path) -> list[Path]:
    """The record files of a run, packed by gzip or not."""
    return sorted([*folder.glob("records*.jsonl"), *folder.glob("records*.jsonl.gz")])


def read_records(paths: Iterable[Path]) -> list[Record]:
    """The records of several files, packed by gzip or not, without answers of which a turn is missing.

    Raises:
        InputError: a line is no record.
    """
    return _whole([record for path in paths for record in _read(path)])


def _read(path: Path) -> list[Record]:
    """The whole lines of a record file.

    Raises:
        InputError: one is no record.
    """
    records = []
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); give another folder.") from None
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            _case(record), record["turn"], record["turns"], record["method"], record["token_budget"], record["prompt"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number} is no record of an evaluation; give another folder.") from None
        records.append(record)
    return records


def _whole(records: Sequence[Record]) -> list[Record]:
    """Without answers of which a turn is missing, as a full disk leaves them."""
    turns: dict[tuple[object, ...], int] = {}
    for record in records:
        turns[_answer(record)] = turns.get(_answer(record), 0) + 1
    return [record for record in records if turns[_answer(record)] == record["turns"]]


def _case(record: Record) -> Case:
    return Case(record["task"], record["id"], record["length"])


def _answer(record: Record) -> tuple[object, ...]:
    return *_case(record), record["method"], record["token_budget"]
