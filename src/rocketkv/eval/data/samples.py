"""The schema of samples for every suite: a sample is a context and one or several questions with their answers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rocketkv.eval.data.files import Item, find_files


@dataclass(frozen=True)
class Turn:
    """A question and its accepted answers.

    Attributes:
        question: the text that follows the context, or the last answer, in the prompt, to the letter.
        answers: the accepted answers, at least one; the task's metric defines how they are compared.
        max_new_tokens: the largest number of tokens to generate, >= 1.
        answer_prefix: the answer's first words, put after the chat template's own start of an answer.
        options: the texts that a multiple choice may choose from.
        subtask: the kind of the question, in tasks that mix two kinds.
    """

    question: str
    answers: Sequence[str]
    max_new_tokens: int
    answer_prefix: str = ""
    options: Sequence[str] = ()
    subtask: str = ""


@dataclass(frozen=True)
class Sample:
    """One case of a task.

    Attributes:
        id: a name that is unique within the suite and task.
        suite: a key of `SUITES`.
        task: the name of one of the suite's tasks.
        context: the prompt up to the first question, to the letter: the prompt is `context + turns[0].question`.
        turns: the questions, at least one.
        chat: whether the prompt goes through the model's chat template.
        all_classes: the class names of a classification.
        length: the length that was asked for, in tokens or words, where the suite has lengths.
        depth: the place of the answer in the context, from 0 to 1; None if the answer has no single place.
        lang: the language of the text.
    """

    id: str
    suite: str
    task: str
    context: str
    turns: Sequence[Turn]
    chat: bool
    all_classes: Sequence[str] = ()
    length: int | None = None
    depth: float | None = None
    lang: str = "en"


@dataclass(frozen=True)
class Fault:
    """A row that could not be made into a sample; the others are evaluated without it.

    Attributes:
        source: the file, and the line or member of it.
        reason: one sentence: what is wrong and what is expected.
    """

    source: str
    reason: str


class BrokenRowError(Exception):
    """A row does not fit the schema; the message becomes the reason of its `Fault`."""


def load_samples(path: Path) -> Iterator[Sample | Fault]:
    """Load samples in this schema: one JSON object each, with the attributes of `Sample` and `Turn` as keys.

    Args:
        path: a file, a folder or a .zip; see `rocketkv.eval.data.files`.

    Raises:
        InputError: the path does not exist or cannot be read.
    """
    items = (item for file in find_files(path) for item in file.items())
    return make_samples(items, lambda row, _: _sample(row))


def make_samples(items: Iterable[Item], make: Callable[[Mapping[str, Any], int], Sample]) -> Iterator[Sample | Fault]:
    """Make a sample of each object; a broken object, or one with an id that was there before, becomes a fault.

    Args:
        items: the rows of files, or generated rows.
        make: a function of an object and its number, from 0; it may raise `BrokenRowError`.
    """
    seen = set()
    for number, item in enumerate(items):
        try:
            if item.value is None:
                raise BrokenRowError(item.reason)
            sample = make(item.value, number)
            key = (sample.suite, sample.task, sample.id)
            if key in seen:
                raise BrokenRowError(f"has the id {sample.id!r} of an earlier row of {sample.task}; give each its own")
        except BrokenRowError as error:
            yield Fault(item.source, str(error))
        else:
            seen.add(key)
            yield sample


def take(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    """Return the value of a key, which must be of the given `kind`.

    Raises:
        BrokenRowError: the value is of another kind, or is missing and there is no `default`.
    """
    value = row.get(name, default)
    if value is ...:
        raise BrokenRowError(f"has no {name!r}")
    if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise BrokenRowError(f"has {type(value).__name__} as {name!r} where {kinds} is expected")
    return value


def take_texts(row: Mapping[str, Any], name: str, at_least: int = 1) -> tuple[str, ...]:
    """Return the strings in the list under a key; none where `at_least` is 0 and the key is missing.

    Raises:
        BrokenRowError: the value is no list of strings, or has too few.
    """
    texts = take(row, name, list) if at_least else take(row, name, list, [])
    if len(texts) < at_least or not all(isinstance(text, str) for text in texts):
        raise BrokenRowError(f"has {str(texts)[:40]} as {name!r} where at least {at_least} strings are expected")
    return tuple(texts)


def _sample(row: Mapping[str, Any]) -> Sample:
    _refuse_unknown(row, Sample)
    turns = take(row, "turns", list)
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BrokenRowError("has 'turns' that are no list of at least one object")
    return Sample(
        id=take(row, "id", str),
        suite=take(row, "suite", str),
        task=take(row, "task", str),
        context=take(row, "context", str),
        turns=tuple(_turn(turn) for turn in turns),
        chat=take(row, "chat", bool),
        all_classes=take_texts(row, "all_classes", at_least=0),
        length=take(row, "length", int, None),
        depth=take(row, "depth", (int, float), None),
        lang=take(row, "lang", str, "en"),
    )


def _turn(row: Mapping[str, Any]) -> Turn:
    _refuse_unknown(row, Turn)
    max_new_tokens = take(row, "max_new_tokens", int)
    if max_new_tokens < 1:
        raise BrokenRowError(f"has {max_new_tokens} as 'max_new_tokens' where at least 1 is expected")
    return Turn(
        question=take(row, "question", str),
        answers=take_texts(row, "answers"),
        max_new_tokens=max_new_tokens,
        answer_prefix=take(row, "answer_prefix", str, ""),
        options=take_texts(row, "options", at_least=0),
        subtask=take(row, "subtask", str, ""),
    )


def _refuse_unknown(row: Mapping[str, Any], schema: type) -> None:
    """Refuse unknown keys, so that a misspelt optional key is not taken for a missing one."""
    names = {field.name for field in fields(schema)}
    if unknown := sorted(set(row) - names):
        raise BrokenRowError(f"has the unknown key {unknown[0]!r}; known are {', '.join(sorted(names))}")
