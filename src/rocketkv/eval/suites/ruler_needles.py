"""RULER's eight needle tasks: keys and values hidden in prose, in noise, or among others of their kind.

Source and licence as of `ruler_tasks`.
"""

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rocketkv.eval.data.haystack import split_sentences, take_words
from rocketkv.eval.suites.ruler_tasks import NOISE, Draft, Material, word_list

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [round(step * 100 / 39) / 100 for step in range(40)]


@dataclass(frozen=True)
class Needles:
    """Keys and values hidden in a haystack of `essay`, `noise` or other `needles`."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    smallest: ClassVar[int] = 4  # there must be a line for each needle

    def draw(self, generator: random.Random, size: int, material: Material) -> Draft:
        """Hide the needles among `size` words or lines."""
        keys = [_draw(self.keys, generator) for _ in range(self.num_keys)]
        values = [[_draw(self.values, generator) for _ in range(self.num_values)] for _ in keys]
        asked = generator.sample(range(self.num_keys), self.num_queries)
        needles = [
            NEEDLE.format(kind=self.values, key=key, value=value)
            for key, own in zip(keys, values, strict=True)
            for value in own
        ]
        generator.shuffle(needles)
        context, depths = self._hide(needles, generator, size, material)
        names = [keys[number] for number in asked]
        query = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
        answers = [value for number in asked for value in values[number]]
        depth = depths[0] if len(depths) == 1 else None
        if len(answers) > 1:
            return Draft(
                f"Some special magic {self.values} are hidden within the following text. Make sure to memorize it. "
                f"I will quiz you about the {self.values} afterwards.\n{context}\n",
                f"What are all the special magic {self.values} for {query} mentioned in the provided text?",
                f" The special magic {self.values} for {query} mentioned in the provided text are",
                answers,
                depth,
            )
        kind = self.values.removesuffix("s")
        return Draft(
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n{context}\n",
            f"What is the special magic {kind} for {query} mentioned in the provided text?",
            f" The special magic {kind} for {query} mentioned in the provided text is",
            answers,
            depth,
        )

    def _hide(
        self, needles: Sequence[str], generator: random.Random, size: int, material: Material
    ) -> tuple[str, list[float]]:
        """Return the text with the needles in it, and their depths."""
        if self.haystack == "essay":
            start = generator.randrange(len(material.words)) if material.start is None else material.start
            depths = sorted(generator.sample(DEPTHS, len(needles)))
            sentences = split_sentences("".join(take_words(material.words, start, size)))
            places, joint = [int(len(sentences) * depth) for depth in depths], " "
        else:
            places, joint = sorted(generator.sample(range(size), len(needles))), "\n"
            sentences = [NOISE] * size if self.haystack == "noise" else [self._other(generator) for _ in range(size)]
            depths = [place / size for place in places]
        for place, needle in reversed([*zip(places, needles, strict=True)]):
            sentences.insert(place, needle)
        return joint.join(sentences), depths

    def _other(self, generator: random.Random) -> str:
        """Return a needle that is not asked for."""
        key, value = _draw(self.keys, generator), _draw(self.values, generator)
        return NEEDLE.format(kind=self.values, key=key, value=value)


def _draw(kind: str, generator: random.Random) -> str:
    """Return a random key or value: seven digits, two words, or a UUID."""
    if kind == "numbers":
        return str(generator.randrange(1_000_000, 10_000_000))
    if kind == "uuids":
        return str(uuid.UUID(int=generator.getrandbits(128), version=4))
    return f"{generator.choice(word_list('adjective'))}-{generator.choice(word_list('noun'))}"
