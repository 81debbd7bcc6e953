"""Two planted facts, asked for in two turns over one cache: does the second survive what the first turn evicted?"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rocketkv.config import RocketKVConfig
from rocketkv.eval.facts import KEYS, take_prose
from rocketkv.models import LoadedModel
from rocketkv.session import Session

# Facts of two kinds, in words of their own: the embedded model mixes up two of one kind even with the full cache.
FACTS = ("The secret password for the {name} room is {number}.", "The telephone number of Mr. {name} is {number}.")
QUESTIONS = ("What is the secret password for the {name} room?", "What is the telephone number of Mr. {name}?")
NEW_TOKENS = 32


@dataclass(frozen=True)
class TurnsRow:
    """One case under one cache: whether the first and the second fact were found."""

    case: int
    cache: str
    first: bool
    second: bool


def caches(token_budget: int) -> dict[str, RocketKVConfig | None]:
    """What is compared: the full cache, the multi-turn variant and the single-turn variant."""
    return {
        "full": None,
        "multi_turn": RocketKVConfig(token_budget=token_budget, mode="multi_turn", dense_below=0),
        "single_turn": RocketKVConfig(token_budget=token_budget, mode="single_turn", dense_below=0),
    }


def run(loaded: LoadedModel, text: str, length: int, token_budget: int, cases: Sequence[int]) -> Iterator[TurnsRow]:
    """Ask for two facts in `length` tokens of `text`, one after the other, with every cache; yields as results come.

    Raises:
        InputError: the text is too short or the model's context is.
    """
    for case in cases:
        generator = random.Random(7000 + case)
        names = [key.title() for key in generator.sample(KEYS, 2)]
        numbers = [str(generator.randrange(1_000_000, 10_000_000)) for _ in names]
        words = take_prose(loaded, text, length, generator).split(" ")
        for fact, name, number in zip(FACTS, names, numbers, strict=True):
            words.insert(generator.randrange(len(words)), fact.format(name=name, number=number))
        asked = [question.format(name=name) for question, name in zip(QUESTIONS, names, strict=True)]
        for cache, config in caches(token_budget).items():
            session = Session(loaded, config, NEW_TOKENS)
            first = session.send(f"{' '.join(words)}\n\n{asked[0]}")
            second = session.send(asked[1])
            yield TurnsRow(case, cache, numbers[0] in first.text, numbers[1] in second.text)
