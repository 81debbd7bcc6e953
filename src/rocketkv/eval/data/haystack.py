"""Prose in which needles are hidden, and the search for the amount of it that fills a length."""

import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from rocketkv.errors import InputError
from rocketkv.eval.data.dialogue import encode
from rocketkv.eval.data.samples import Sample

# A sentence ends at white space after an end mark and before a possible start, by a simple rule; not after initials
# and titles.
_SENTENCE_END = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["'\u201d\u2019)\]]))(?<!\b[A-Z]\.)(?<!\b[DMS][rt]\.)(?<!\bMrs\.)"""
    r"""\s+(?=["'\u201c\u2018(\[]?[A-Z0-9])"""
)


def default_text() -> str:
    """Return prose that every Python install has: the topics of its help system, about half a megabyte."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def split_words(text: str) -> list[str]:
    """Return the words of a text, each with the white space after it, so that joined they are the text.

    Raises:
        InputError: the text has no words.
    """
    words = re.findall(r"\S+\s*", text.rstrip() + "\n")
    if not words:
        raise InputError("the haystack is empty; give a file with prose.")
    return words


def take_words(words: Sequence[str], start: int, count: int) -> list[str]:
    """Return `count` words from word `start` on; after its end the text begins anew, as in NIAH and RULER."""
    return [words[(start + offset) % len(words)] for offset in range(count)]


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, without the white space between them."""
    return _SENTENCE_END.split(text.strip())


def plant(words: Sequence[str], needle: str, depth: float) -> str:
    """Return the text of `words` with `needle` before word `int(len(words) * depth)`; `depth` is from 0 to 1."""
    place = int(len(words) * depth)
    return f"{''.join(words[:place]).strip()} {needle} {''.join(words[place:]).strip()}"


def fill(
    make: Callable[[int], Sample], tokenizer: PreTrainedTokenizerBase, smallest: int, largest: int, length: int
) -> Sample:
    """Return the largest sample that fits: its longest prompt and answer have at most `length` tokens.

    Args:
        make: a function that makes the sample of a size (in words, sentences or documents), the same at every call.
        tokenizer: the model's tokenizer.
        smallest: the size to start from, >= 1.
        largest: the size to stop at, >= `smallest`.
        length: the length to fill, in tokens.

    Returns:
        The sample.

    Raises:
        InputError: not even the smallest sample fits.
    """

    def need(sample: Sample) -> int:
        return encode(tokenizer, sample, "multi_turn").needed_tokens(sample.turns)

    good, bad, best = smallest, largest + 1, make(smallest)
    if (least := need(best)) > length:
        raise InputError(f"length={length} is too short for {best.task} of {best.suite}; give at least {least}.")
    while bad - good > 1:
        size = min(2 * good, (good + bad) // 2)  # the search doubles the size until it is too large, then bisects
        sample = make(size)
        if need(sample) <= length:
            good, best = size, sample
        else:
            bad = size
    return best
