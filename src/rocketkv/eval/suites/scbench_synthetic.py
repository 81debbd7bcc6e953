"""Rows in the official format of SCBench's string retrieval, at any length, without the official data.

Source: Li et al., "SCBench: A KV Cache-Centric Analysis of Long-Context Methods", table of tasks: key-value pairs of
36 characters; strings of 65 to 122 characters; two chains of variables over two hops, in noise.
"""

import json
import random
import string
from collections.abc import Callable
from typing import Any
from uuid import UUID

from transformers import PreTrainedTokenizerBase

from rocketkv.errors import InputError

TURNS = 5  # questions of key-value and prefix-suffix lookups; variable tracking has one per chain
CHAINS, HOPS = 2, 2
AFFIX = 8  # the number of characters of a prefix or suffix
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SMALLEST = 2 * TURNS  # the least number of pairs, strings or noises in a context

Row = dict[str, Any]


def make_row(task: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: str) -> Row:
    """Return a row whose context has at most `length` tokens, and nearly as many.

    Args:
        task: a key of `MAKERS`.
        tokenizer: the tokenizer that counts the length.
        length: the context's length in tokens.
        seed: the seed of everything drawn at random.

    Raises:
        InputError: the length is too short for the questions.
    """

    def make(size: int) -> Row:
        return MAKERS[task](random.Random(seed), size)

    def count(row: Row) -> int:
        return len(tokenizer(row["context"], add_special_tokens=False, verbose=False).input_ids)

    size, smallest = SMALLEST, count(make(SMALLEST))
    for _ in range(3):  # tokens per pair, string or noise, estimated anew in each round
        size = max(SMALLEST, size * length // count(make(size)))
    row = make(size)
    while count(row) > length:
        size -= 1 + size // 100
        if size < SMALLEST:
            raise InputError(f"length={length} is too short for {task}; give at least {smallest + smallest // 4}.")
        row = make(size)
    return row


def _key_value(generator: random.Random, size: int) -> Row:
    keys = [_uuid(generator) for _ in range(size)]
    values = {key: _uuid(generator) for key in keys}
    turns = [
        {"input": f'Key: "{key}"\nThe value associated with the specified key is:', "answer": values[key]}
        for key in generator.sample(keys, TURNS)
    ]
    return {"context": json.dumps(values), "multi_turns": turns}


def _prefix_suffix(generator: random.Random, size: int) -> Row:
    letters = string.ascii_letters + string.digits
    words = ["".join(generator.choices(letters, k=generator.randrange(65, 123))) for _ in range(size)]
    turns = [
        {
            "input": f"Prefix: {word[:AFFIX]}; Suffix: {word[-AFFIX:]}. "
            "The word with both prefix and suffix from the dict is:",
            "answer": word,
        }
        for word in generator.sample(words, TURNS)
    ]
    return {"context": f"Dictionary = {json.dumps(words)}", "multi_turns": turns}


def _variable_tracking(generator: random.Random, size: int) -> Row:
    sentences = [NOISE] * size
    names = _distinct(generator, CHAINS * (HOPS + 1), lambda: "".join(generator.choices(string.ascii_uppercase, k=5)))
    values = _distinct(generator, CHAINS, lambda: str(generator.randrange(10_000, 100_000)))
    placed: list[tuple[int, str]] = []
    turns = []
    for chain, value in enumerate(values):
        chained = names[chain * (HOPS + 1) : (chain + 1) * (HOPS + 1)]
        sources = [value, *(f"VAR {name}" for name in chained)]
        places = sorted(generator.sample(range(size + 1), HOPS + 1))
        placed += [
            (place, f"VAR {name} = {source}.") for place, name, source in zip(places, chained, sources, strict=False)
        ]
        turns.append(
            {
                "input": f"Question: Find all variables that are assigned the value {value} in the text above.",
                "answer": chained,
            }
        )
    for place, sentence in sorted(placed, reverse=True):
        sentences.insert(place, sentence)
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text."
    return {"context": f"{head}\n\n" + "\n".join(sentences), "multi_turns": turns}


def _uuid(generator: random.Random) -> str:
    return str(UUID(int=generator.getrandbits(128), version=4))


def _distinct(generator: random.Random, number: int, draw: Callable[[], str]) -> list[str]:
    """Return `count` different strings, in random order."""
    drawn: set[str] = set()
    while len(drawn) < number:
        drawn.add(draw())
    return generator.sample(sorted(drawn), number)


MAKERS: dict[str, Callable[[random.Random, int], Row]] = {
    "scbench_kv": _key_value,
    "scbench_prefix_suffix": _prefix_suffix,
    "scbench_vt": _variable_tracking,
}
