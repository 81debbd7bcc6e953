"""The tasks of the suite `qa`, whose cases grow by passages, lines, pairs or paragraphs until they fill the length.

Prompts of Natural Questions and of key retrieval begin as those of "Lost in the Middle" (Liu et al.); those of line
retrieval stand in its rows. Every answer's first words are given.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rocketkv.eval.data.documents import Article
from rocketkv.eval.data.samples import BrokenRowError, Turn, take, take_texts
from rocketkv.eval.metrics.official import normalize_english

NQ_OPENING = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant).\n\n"
)
KV_OPENING = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
SQUAD_OPENING = "Read the following article and answer the question with a few words from it.\n\n"


class Draft(NamedTuple):
    """A case at a size: its context, its questions, and the depth of the answer if it is one."""

    context: str
    turns: Sequence[Turn]
    depth: float | None = None


class Growing(NamedTuple):
    """A case at any size from `smallest` to `largest`; the larger, the longer."""

    make: Callable[[int], Draft]
    smallest: int
    largest: int


Grow = Callable[[Sequence[Any], int, random.Random], Growing]  # makes a case from rows, a row's number and a generator


class Passage(NamedTuple):
    """A question, its answers, and the passage that has them, as it is and normalized."""

    question: str
    answers: tuple[str, ...]
    document: str
    normalized: str


def parse_passage(row: Mapping[str, Any]) -> Passage:
    """Return a row of Natural Questions with its gold passage.

    Raises:
        BrokenRowError: the object is no such row.
    """
    answers = tuple(answer for answer in take_texts(row, "answers") if normalize_english(answer))
    golds = [passage for passage in take(row, "ctxs", list) if isinstance(passage, dict) and passage.get("isgold")]
    if not golds or not answers:
        raise BrokenRowError("has no passage with 'isgold' in 'ctxs', or no answer but articles and punctuation")
    title, text = take(golds[0], "title", str), take(golds[0], "text", str)
    return Passage(take(row, "question", str), answers, f"(Title: {title}) {text}", normalize_english(text))


def grow_passages(passages: Sequence[Passage], number: int, generator: random.Random) -> Growing:
    """Make a question over its passage at a random place among other passages, which have none of its answers."""
    asked = passages[number]
    answers = [normalize_english(answer) for answer in asked.answers]
    others = [other for other in passages if not any(answer in other.normalized for answer in answers)]
    distractors = list(dict.fromkeys(other.document for other in others))
    generator.shuffle(distractors)
    place = generator.random()
    turn = _ask(asked.question, asked.answers)

    def make(size: int) -> Draft:
        documents = distractors[: size - 1]
        gold = int(size * place)
        documents.insert(gold, asked.document)
        listed = "\n".join(f"Document [{rank}]{document}" for rank, document in enumerate(documents, 1))
        return Draft(f"{NQ_OPENING}{listed}\n\n", (turn,), gold / max(1, size - 1))

    return Growing(make, 1, len(distractors) + 1)


def _ask(question: str, answers: Sequence[str]) -> Turn:
    """Return a question as a sentence, with an answer's first words that keep even small models to the text."""
    text = question.strip().rstrip("?").rstrip()
    return Turn(f"{text[:1].upper()}{text[1:]}?", answers, max_new_tokens=32, answer_prefix="According to the text,")


class Lines(NamedTuple):
    """LongEval's record: what comes before it, its lines, the asked one, what comes after it, and the answer."""

    opening: str
    lines: Sequence[str]
    asked: int
    question: str
    name: str
    number: int


def parse_lines(row: Mapping[str, Any]) -> Lines:
    """Return a row of LongEval's line retrieval.

    Raises:
        BrokenRowError: the object is no such row.
    """
    parts = take(row, "prompt", str).split("\n\n")
    name = next(iter(take(row, "random_idx", list)), None)
    lines = parts[1].split("\n") if len(parts) == 3 else []
    asked = [index for index, line in enumerate(lines) if line.startswith(f"line {name}:")]
    if len(asked) != 1:
        raise BrokenRowError(f"has no 'prompt' of three paragraphs whose second has one line {name!r}")
    return Lines(parts[0], lines, asked[0], parts[2], str(name), take(row, "expected_number", int))


def grow_lines(rows: Sequence[Lines], number: int, generator: random.Random) -> Growing:
    """Make the asked line stand among others of its record, in their order."""
    row = rows[number]
    prefix = f"The <REGISTER_CONTENT> in line {row.name} is"
    turn = Turn(row.question, (str(row.number),), max_new_tokens=24, answer_prefix=prefix)
    return _thinned(
        row.lines, [row.asked], generator, lambda kept: "\n\n".join([row.opening, "\n".join(kept), ""]), [turn]
    )


class Pairs(NamedTuple):
    """Keys and their values, and the key that is asked for."""

    values: Mapping[str, str]
    key: str


def parse_pairs(row: Mapping[str, Any]) -> Pairs:
    """Return a row of key retrieval.

    Raises:
        BrokenRowError: the object is no such row.
    """
    pairs = take(row, "ordered_kv_records", list)
    if not all(isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in pairs):
        raise BrokenRowError("has 'ordered_kv_records' that are no list of pairs of strings")
    values, key = dict(pairs), take(row, "key", str)
    if key not in values or len(values) < 2:
        raise BrokenRowError(f"has no pair with its 'key' {key!r} among others in 'ordered_kv_records'")
    return Pairs(values, key)


def grow_pairs(rows: Sequence[Pairs], number: int, generator: random.Random, turns: int) -> Growing:
    """Make one asked key, or `turns` random ones, stand among others of the object, in their order."""
    values, keys = rows[number].values, list(rows[number].values)
    asked = [rows[number].key] if turns == 1 else generator.sample(keys, min(turns, len(keys)))
    questions = [
        Turn(f'Key: "{key}"', (values[key],), max_new_tokens=48, answer_prefix="Corresponding value:") for key in asked
    ]
    lines = [f'"{key}": "{value}"' for key, value in values.items()]
    places = [keys.index(key) for key in asked]
    return _thinned(lines, places, generator, lambda kept: KV_OPENING + ",\n ".join(kept) + "}\n\n", questions)


def _thinned(
    items: Sequence[str],
    asked: Sequence[int],
    generator: random.Random,
    render: Callable[[Sequence[str]], str],
    turns: Sequence[Turn],
) -> Growing:
    """Return the asked items among `size` others, all in their order."""
    others = [index for index in range(len(items)) if index not in asked]
    generator.shuffle(others)

    def make(size: int) -> Draft:
        kept = sorted([*asked, *others[:size]])
        depth = kept.index(asked[0]) / max(1, len(kept) - 1) if len(asked) == 1 else None
        return Draft(render([items[index] for index in kept]), turns, depth)

    return Growing(make, 1, max(1, len(others)))


class Start(NamedTuple):
    """An article and the paragraph that a context begins with."""

    article: Article
    paragraph: int


def find_starts(articles: Sequence[Article], turns: int, generator: random.Random) -> list[Start]:
    """Return every paragraph of the articles that have `turns` questions, in random order."""
    asked = [article for article in articles if sum(len(paragraph.questions) for paragraph in article) >= turns]
    starts = [Start(article, paragraph) for article in asked for paragraph in range(len(article))]
    generator.shuffle(starts)
    return starts


def grow_article(starts: Sequence[Start], number: int, generator: random.Random, turns: int) -> Growing:
    """Take an article's paragraphs from one on, round to the one before it, and ask random questions of them."""
    article, start = starts[number]
    paragraphs = [*article[start:], *article[:start]]
    state = generator.getstate()

    def make(size: int) -> Draft:
        generator.setstate(state)
        chosen = generator.sample([q for paragraph in paragraphs[:size] for q in paragraph.questions], turns)
        text = "\n\n".join(paragraph.text for paragraph in paragraphs[:size])
        asked = [_ask(question.text, question.answers) for question in chosen]
        return Draft(f"{SQUAD_OPENING}{text}\n\n", asked)

    counts = [len(paragraph.questions) for paragraph in paragraphs]
    smallest = next(size for size in range(1, len(counts) + 1) if sum(counts[:size]) >= turns)
    return Growing(make, smallest, len(paragraphs))
