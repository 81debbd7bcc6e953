"""Documents with questions about them, from SQuAD v2 and HotpotQA (distractor) files, told apart by their content."""

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rocketkv.errors import InputError


class Question(NamedTuple):
    """A question and its accepted answers, of which there is at least one."""

    text: str
    answers: tuple[str, ...]


class Paragraph(NamedTuple):
    """A paragraph and the questions that it answers."""

    text: str
    questions: tuple[Question, ...]


Article = Sequence[Paragraph]


class Case(NamedTuple):
    """A question, the documents that answer it, and related documents."""

    question: Question
    documents: tuple[str, ...]
    related: tuple[str, ...] = ()


def read_squad(data: Path) -> list[Article]:
    """Return the articles of a SQuAD file with their paragraphs; questions without an answer are left out.

    Args:
        data: the file, .json or .json.gz, or a folder with it.

    Returns:
        The articles; none if there is no such file.

    Raises:
        InputError: `data` does not exist, or a file cannot be read.
    """
    return _read(data, lambda content: [_article(article) for article in content["data"]])


def read_hotpotqa(data: Path) -> list[Case]:
    """Return the questions of a HotpotQA file, each with its documents, the title first.

    Args:
        data: the file, .json or .json.gz, or a folder with it.

    Returns:
        The cases; none if there is no such file.

    Raises:
        InputError: `data` does not exist, or a file cannot be read.
    """
    return _read(data, lambda content: [_case(row) for row in content])


_Parsed = TypeVar("_Parsed", list[Article], list[Case])


def _read(data: Path, parse: Callable[[Any], _Parsed]) -> _Parsed:
    """Return the result of `parse` for the first file that it accepts; an empty list if it accepts none."""
    if not data.exists():
        raise InputError(f"{data} does not exist; give a file or a folder.")
    for path in sorted(data.iterdir()) if data.is_dir() else [data]:
        if path.name.endswith((".json", ".json.gz")):
            content = _load(path)
            try:
                parsed = parse(content)
            except (KeyError, TypeError, ValueError, AttributeError):
                continue  # this is a file of another kind
            if parsed:
                return parsed
    return []


def _load(path: Path) -> Any:
    """Return the value of a JSON file."""
    try:
        content = path.read_bytes()
        return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); give another file.") from None


def _article(row: Any) -> Article:
    return [
        Paragraph(
            str(paragraph["context"]),
            tuple(
                Question(question["question"], tuple(dict.fromkeys(answer["text"] for answer in question["answers"])))
                for question in paragraph["qas"]
                if question["answers"] and not question.get("is_impossible", False)
            ),
        )
        for paragraph in row["paragraphs"]
    ]


def _case(row: Any) -> Case:
    documents = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in row["context"])
    return Case(Question(row["question"], (row["answer"],)), documents)
