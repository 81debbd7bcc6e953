"""RULER's tasks but the needles: a case is drawn from a seeded generator at a size, in words, lines or documents.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", and NVIDIA/RULER
(Apache-2.0), whose prompts these are to the letter; the code is our own.
"""

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar, NamedTuple, Protocol

from rocketkv.errors import InputError
from rocketkv.eval.data.documents import Case

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Draft(NamedTuple):
    """A case before it is a sample: the parts of its prompt, its answers, and their depth if they have one place."""

    context: str
    question: str
    answer_prefix: str
    answers: Sequence[str]
    depth: float | None = None


@dataclass(frozen=True)
class Material:
    """The material that cases are made of.

    Attributes:
        words: the haystack's words.
        start: the word to start from; None: any.
        length: the tokens that were asked for.
        case: a question and its documents.
        pool: the documents to add to the case's own.
    """

    words: Sequence[str]
    start: int | None
    length: int
    case: Case | None = None
    pool: Sequence[str] = ()


class Task(Protocol):
    """The interface of a task, which draws its cases.

    Attributes:
        smallest: the smallest size that makes sense.
    """

    smallest: ClassVar[int]

    def draw(self, generator: random.Random, size: int, material: Material) -> Draft:
        """Draw a case of a size, the same for the same state of the generator."""
        ...


class VariableTracking:
    """One chain of five variables with the same value, after a worked example."""

    smallest: ClassVar[int] = 5

    def draw(self, generator: random.Random, size: int, material: Material) -> Draft:
        """Hide the chain's assignments, in order, among `size` lines of noise."""
        example = self._part(generator, 10, name_length=3)
        part = self._part(generator, size, name_length=5)
        shown = f"{example.context}{example.question}{example.answer_prefix} {' '.join(example.answers)}\n\n"
        return part._replace(context=shown + part.context)

    def _part(self, generator: random.Random, size: int, name_length: int) -> Draft:
        names: list[str] = []
        while len(names) < 5:
            name = "".join(generator.choices(string.ascii_uppercase, k=name_length))
            names += [name] if name not in names else []
        value = str(generator.randrange(10_000, 99_999))
        chain = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in pairwise(names))]
        lines = [NOISE] * size
        for place, assignment in reversed([*zip(sorted(generator.sample(range(size), 5)), chain, strict=True)]):
            lines.insert(place, assignment)
        return Draft(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            + "\n".join(lines)
            + "\n",
            f"Question: Find all variables that are assigned the value {value} in the text above.",
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"5 variables are assgined the value {value}, they are: ",
            names,
        )


class CommonWords:
    """A numbered list of words of which ten are common, after a worked example."""

    smallest: ClassVar[int] = 11

    def draw(self, generator: random.Random, size: int, material: Material) -> Draft:
        """List `size` different words."""
        short = material.length < 4096
        example = self._part(generator, *((20, 3, 1) if short else (40, 10, 3)))
        part = self._part(generator, size, *((6, 1) if short else (30, 3)))
        numbered = " ".join(f"{number}. {word}" for number, word in enumerate(example.answers, 1))
        shown = f"{example.context}{example.question}{example.answer_prefix} {numbered}\n"
        return part._replace(context=shown + part.context)

    def _part(self, generator: random.Random, size: int, common_repeats: int, other_repeats: int) -> Draft:
        words = generator.sample(all_words(), size)
        common = words[:10]
        listed = common * common_repeats + words[10:] * other_repeats
        generator.shuffle(listed)
        return Draft(
            "Below is a numbered list of words. In these words, some appear more often than others. "
            "Memorize the ones that appear most often.\n"
            + " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
            + "\n",
            "Question: What are the 10 most common words in the above list?",
            " Answer: The top 10 words that appear most often in the list are:",
            common,
        )


class FrequentWords:
    """Made-up words, their frequencies by Zipf's law with exponent 2; the most frequent one is shown as dots."""

    smallest: ClassVar[int] = 80  # with these sizes the first four ranks differ in frequency

    def draw(self, generator: random.Random, size: int, material: Material) -> Draft:
        """Write a text of about `size` words."""
        vocabulary: dict[str, None] = {}
        while len(vocabulary) < max(4, material.length // 50):
            vocabulary["".join(generator.choices(string.ascii_lowercase, k=6))] = None
        ranked = ["...", *list(vocabulary)[1:]]
        text = [word for rank, word in enumerate(ranked, 1) for _ in range(int(size * rank**-2 / (math.pi**2 / 6)))]
        generator.shuffle(text)
        return Draft(
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(text)}\n",
            "Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?",
            " Answer: According to the coded text above, the three most frequently appeared words are:",
            ranked[1:4],
        )


class DocumentsQuestion:
    """A question over the documents that answer it, among others."""

    smallest: ClassVar[int] = 1

    def draw(self, generator: random.Random, size: int, material: Material) -> Draft:
        """Ask the question over its own documents and `size` more, related ones first, in random order."""
        case = material.case
        assert case is not None
        others = [document for document in material.pool if document not in case.documents + case.related]
        related = generator.sample(case.related, min(size, len(case.related)))
        more = generator.sample(others, min(size - len(related), len(others)))
        documents = [*case.documents, *related, *more]
        generator.shuffle(documents)
        task = (
            "Answer the question based on the given documents. "
            "Only give me the answer and do not output any other words."
        )
        listed = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, 1))
        return Draft(
            f"{task}\n\nThe following are given documents.\n\n{listed}\n\n",
            f"{task}\n\nQuestion: {case.question.text}",
            " Answer:",
            case.question.answers,
        )


@cache
def all_words() -> list[str]:
    """Return the words of all categories, sorted; errors are those of `word_list`."""
    return sorted({word for name in ("noun", "adjective", "verb") for word in word_list(name)})


@cache
def word_list(name: str) -> list[str]:
    """Return the words of a category (noun, adjective, verb) of `wonderwords`, as RULER does.

    Raises:
        InputError: the package is missing.
    """
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise InputError("RULER needs the package wonderwords; install it with `pip install rocketkv[eval]`.") from None
    return list(RandomWord().filter(include_categories=[name]))
