"""The folder that a run fills with its settings, every answer and every fault. A killed run goes on where it stopped.

run.json: the settings of the run, the machine, versions and commands, and other machines and versions that later
commands ran with. records.jsonl: one object per sample, method, budget and turn. faults.jsonl: the samples that the
last run could not evaluate. Shard i of n has `-i-of-n` in the names of the latter two.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rocketkv.errors import InputError
from rocketkv.eval.data.samples import Fault
from rocketkv.eval.run.methods import Arm
from rocketkv.eval.run.records import Case, Record, case_of, find_records, parse, read_lines, read_records, without_torn


@dataclass(frozen=True)
class Shard:
    """A part of a run: every `count`-th sample, from the `index`-th on, counted from 1."""

    index: int = 1
    count: int = 1

    @property
    def suffix(self) -> str:
        """The suffix of the names of this shard's files."""
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"


class Journal:
    """The files of a run, open for more answers; a `with` block keeps other runs from writing to them.

    Args:
        folder: the folder of these files, made if it does not exist.
        settings: the values, by name of the option, on which all runs into this folder must agree.
        shard: the part of all samples that is run.
        facts: further facts to note in run.json, beside those that earlier runs noted.
        command: the command that started this run.

    Attributes:
        records: all answers so far, those of other shards included.
        faults: the number of faults in this run.
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
        """Open the files and see that they are ours to write to; `begin` writes to them.

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
        self._known = self._read_settings()
        own = read_lines(self._path)
        self._own = without_torn(own)
        self._is_torn = len(self._own) < len(own) or self._path.read_bytes()[-1:] not in (b"", b"\n")
        others = [path for path in find_records(self._folder) if path != self._path]
        self.records = self._own + read_records(others)
        for record in self.records:
            self._by_case.setdefault(case_of(record), []).append(record)

    def begin(self) -> None:
        """Note the run in run.json, drop what a killed run left torn and the last run's faults.

        To be called when all that could refuse the run has been checked, so that a refused one leaves nothing behind
        that would refuse the next.

        Raises:
            InputError: a file cannot be written.
        """
        with self._writing():
            if (known := self._with_this_run()) != self._known:
                path = self._folder / "run.json"
                new = path.with_name(f"{path.name}.{os.getpid()}")
                new.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                new.replace(path)
            self._faults_path.write_text("")
            if self._is_torn:
                self._file.truncate(0)
        if self._is_torn:
            self._write(self._own)

    def _with_this_run(self) -> dict[str, Any]:
        """Return the content of run.json with this run's command and, if they are others, its facts."""
        known, facts = dict(self._known), dict(self._facts)
        known["commands"] = list(dict.fromkeys([*known["commands"], self._command]))
        also = known.get("also_ran_with", [])
        if facts not in also and any(known.get(name) != fact for name, fact in facts.items()):
            known["also_ran_with"] = [*also, facts]
        return known

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files, so that other runs can write to them."""
        with suppress(OSError):  # closing may fail again on a full disk; `_write` has reported that
            self._file.close()

    def of(self, case: Case) -> list[Record]:
        """Return the answers to a sample so far."""
        return self._by_case.get(case, [])

    def missing(self, case: Case, arms: Sequence[Arm], prompt: str) -> list[Arm]:
        """List which of `arms` have not answered a sample, whose prompt has the digest `prompt`.

        Raises:
            InputError: the prompt differs from the one that other arms answered.
        """
        if any(record["prompt"] != prompt for record in self.of(case)):
            raise InputError(
                f"{case.task}, {case.id} is another prompt than in an earlier run into this folder, so its answers do "
                "not compare; give another --out, or the same data and number of samples."
            )
        done = {(record["method"], record["token_budget"]) for record in self.of(case)}
        return [arm for arm in arms if (arm.method, arm.token_budget) not in done]

    def append(self, records: Sequence[Record]) -> None:
        """Add the answers to one sample, all of them or, if the process dies meanwhile, none.

        Raises:
            InputError: the file cannot be written, as where the disk is full.
        """
        self._write(records)
        self.records += records
        for record in records:
            self._by_case.setdefault(case_of(record), []).append(record)

    def note_fault(self, fault: Fault) -> None:
        """Add a sample that could not be evaluated; errors are those of `append`."""
        self.faults += 1
        with self._writing(), self._faults_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(fault), ensure_ascii=False) + "\n")

    def _write(self, records: Iterable[Record]) -> None:
        """Write once and wait once for the disk."""
        with self._writing():
            self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say in one sentence that a file cannot be written."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{error.filename or self._path} cannot be written ({error.strerror}); see to it, then run the same "
                "again, which goes on after the last whole answer."
            ) from None

    def _read_settings(self) -> dict[str, Any]:
        """Return the content of run.json; earlier runs into this folder must have had the same settings."""
        path = self._folder / "run.json"
        if not path.exists():
            return {**self._settings, **self._facts, "commands": []}
        try:
            known: dict[str, Any] = parse(path.read_bytes())
            differing = [name for name, value in self._settings.items() if known[name] != value]
            is_run = isinstance(known["commands"], list)
        except (OSError, ValueError, KeyError, TypeError):
            is_run = False
        if not is_run:
            raise InputError(f"{path} does not describe a run; give another --out.")
        if differing:
            name = differing[0]
            raise InputError(
                f"{self._folder} holds a run with {name}={known[name]!r}, not {self._settings[name]!r}; "
                "give another --out, or the same settings to go on."
            )
        return known
