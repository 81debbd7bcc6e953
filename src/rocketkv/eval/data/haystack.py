"""Prose to hide things in, and how much of it fills a length."""

import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from rocketkv.errors import InputError
from rocketkv.eval.data.dialogue import encode
from rocketkv.eval.data.samples import Sample

# A simple rule, no model: white space after what may end a sentence and before what may start one; not after initials
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
        InputError: there are none.
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
        make: a sample of a size (words, sentences, documents), the same at every call; larger sizes, longer prompts.
        tokenizer: the model's tokenizer.
        smallest: size to start from, >= 1.
        largest: size to stop at, >= `smallest`.
        length: in tokens.

    Returns:
        The sample.

    Raises:
        InputError: not even the smallest fits.
    """

    def need(sample: Sample) -> int:
        return encode(tokenizer, sample, "multi_turn").needed_tokens(sample.turns)

    good, bad, best = smallest, largest + 1, make(smallest)
    if (least := need(best)) > length:
        raise InputError(f"length={length} is too short for {best.task} of {best.suite}; give at least {least}.")
    while bad - good > 1:
        size = min(2 * good, (good + bad) // 2)  # doubles until it is too much, then halves the doubt
        sample = make(size)
        if need(sample) <= length:
            good, best = size, sample
        else:
            bad = size
    return best
