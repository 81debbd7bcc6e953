"""Questions over local files: k-document QA, line and key retrieval, SQuAD; the last two also in several turns.

Files are told by what is in them: Natural Questions with their gold passage (`question`, `answers`, `ctxs`), key
retrieval (`ordered_kv_records`, `key`), LongEval's lines (`prompt`, `random_idx`, `expected_number`), SQuAD v2.

Prompts and answers fill the length that is asked for; lines and pairs are left out until they fit. Without lengths,
line and key retrieval take their rows as they are.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rocketkv.errors import InputError
from rocketkv.eval.data.documents import read_squad
from rocketkv.eval.data.files import DataFile, Item
from rocketkv.eval.data.haystack import fill
from rocketkv.eval.data.samples import BrokenRowError, Fault, Sample
from rocketkv.eval.metrics.official import normalize_english
from rocketkv.eval.suites import qa_tasks as tasks
from rocketkv.eval.suites.base import Request

LENGTHS = (2048, 4096)
TURNS = 4


_PAIRS = ("ordered_kv_records", "key")
_AS_THEY_ARE: Sequence[int | None] = (None,)


class RowTask(NamedTuple):
    """Describes how the rows of .jsonl files become cases.

    Attributes:
        keys: the keys that an object must have to be a row of this task.
        parse: a function that makes a row of an object, or raises `BrokenRowError`.
        grow: a function that makes a case from all rows, a row's number and a random generator.
        lengths: the lengths if the user gives none; None takes the row as it is.
    """

    keys: Sequence[str]
    parse: Callable[[Mapping[str, Any]], Any]
    grow: tasks.Grow
    lengths: Sequence[int | None] = _AS_THEY_ARE


ROW_TASKS = {
    "nq": RowTask(("question", "answers", "ctxs"), tasks.parse_passage, tasks.grow_passages, LENGTHS),
    "lines": RowTask(("prompt", "random_idx", "expected_number"), tasks.parse_lines, tasks.grow_lines),
    "kv": RowTask(_PAIRS, tasks.parse_pairs, partial(tasks.grow_pairs, turns=1)),
    "kv_turns": RowTask(_PAIRS, tasks.parse_pairs, partial(tasks.grow_pairs, turns=TURNS)),
}
SQUAD_TASKS = {"squad": 1, "squad_turns": TURNS}  # and the number of questions asked


class Source(NamedTuple):
    """The rows of a task, its broken rows, and the function that makes cases of the rows."""

    rows: Sequence[Any]
    faults: Sequence[Fault]
    grow: tasks.Grow
    lengths: Sequence[int | None]


class Qa:
    """The suite; see `Suite`."""

    name = "qa"
    tasks = ("nq", "lines", "kv", "squad", "squad_turns", "kv_turns")

    def samples(self, request: Request) -> Iterator[Sample | Fault]:
        """Return the first `num_samples` (all) rows of each task, or of all tasks with data, at each length.

        Raises:
            InputError: an unknown task, no data, data without one of the tasks or, while iterating, a length with no
                room for any of it.
        """
        for name in request.tasks:
            if name not in self.tasks:
                raise InputError(f"qa has no task {name!r}; choose from {', '.join(self.tasks)}.")
        if request.data is None:
            raise InputError("qa needs its data; give --data a .jsonl or SQuAD file, or a folder of them.")
        sources = _read(request.data, request.tasks or self.tasks, request.seed)
        names = request.tasks or [name for name in self.tasks if name in sources]
        if missing := [name for name in names or self.tasks if name not in sources]:
            raise InputError(f"{request.data} has nothing for {', '.join(missing)}; give other data or other tasks.")
        return self._make(request, {name: sources[name] for name in names})

    def score(self, sample: Sample, turn: int, prediction: str) -> Mapping[str, float]:
        """Say whether an answer is in the prediction, both normalized; for lines, whether their number is."""
        answers = sample.turns[turn].answers
        if sample.task == "lines":
            return {"score": float(answers[0] in re.findall(r"\d+", prediction))}
        text = normalize_english(prediction)
        return {"score": float(any(gold in text for gold in map(normalize_english, answers) if gold))}

    def _make(self, request: Request, sources: Mapping[str, Source]) -> Iterator[Sample | Fault]:
        for name, source in sources.items():
            yield from source.faults
            numbers = range(len(source.rows))[: request.num_samples]
            for length, number in product(request.lengths or source.lengths, numbers):
                case = source.grow(source.rows, number, random.Random(request.seed + number))
                yield _sample(name, number, case, length, request)


def _sample(name: str, number: int, case: tasks.Growing, length: int | None, request: Request) -> Sample:
    """Return the case as it is, or as much of the case as fits in the length."""

    def make(size: int) -> Sample:
        draft = case.make(size)
        id = f"{length or 'whole'}-{number}"
        return Sample(id, Qa.name, name, draft.context, draft.turns, chat=True, length=length, depth=draft.depth)

    if length is None:
        return make(case.largest)
    return fill(make, request.tokenizer, case.smallest, case.largest, length)


def _read(data: Path, names: Sequence[str], seed: int) -> dict[str, Source]:
    """Return what a file, or the files of a folder, have for some tasks; tasks without anything are missing.

    Raises:
        InputError: `data` does not exist or a file cannot be read.
    """
    articles = read_squad(data)
    paths = sorted(data.iterdir()) if data.is_dir() else [data]
    files = [list(DataFile(path).items()) for path in paths if path.name.endswith((".jsonl", ".jsonl.gz"))]
    sources = {}
    for name in names:
        if turns := SQUAD_TASKS.get(name):
            if starts := tasks.find_starts(articles, turns, random.Random(seed)):
                sources[name] = Source(starts, (), partial(tasks.grow_article, turns=turns), LENGTHS)
        else:
            task = ROW_TASKS[name]
            if items := [item for file in files if _has(file, task.keys) for item in file]:
                sources[name] = Source(*_parse(items, task.parse), task.grow, task.lengths)
    return sources


def _has(file: Sequence[Item], keys: Sequence[str]) -> bool:
    """Say whether the first object of a file has these keys."""
    first: Mapping[str, Any] = next((item.value for item in file if item.value is not None), {})
    return all(key in first for key in keys)


def _parse(items: Sequence[Item], parse: Callable[[Mapping[str, Any]], Any]) -> tuple[list[Any], list[Fault]]:
    """Return the rows, and those that are broken."""
    rows, faults = [], []
    for item in items:
        try:
            if item.value is None:
                raise BrokenRowError(item.reason)
            rows.append(parse(item.value))
        except BrokenRowError as error:
            faults.append(Fault(item.source, str(error)))
    return rows, faults


SUITE = Qa()
