"""A needle in a haystack: numbers hidden in prose at ten depths, asked for.

`passkey` is the form published with RocketKV: lengths in words, no chat template (the texts are those of the passkey
task of Mohtashami and Jaggi, arXiv:2305.16300). `passkey_tokens` is ours: lengths in tokens, chat form, and the first
words of the answer given, so that small models can do it. `passkey_turns` hides four such numbers, asked for in turn.
`code` is for base models too: a sentence with a code of five digits is hidden, and the prompt ends with the beginning
of that sentence, up to the code.
"""

import random
import string
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from rocketkv.errors import InputError
from rocketkv.eval.data.haystack import fill, plant, split_words, take_words
from rocketkv.eval.data.samples import Fault, Sample, Turn
from rocketkv.eval.metrics.official import normalize_english
from rocketkv.eval.suites.base import Request

DEPTHS = [step / 9 for step in range(10)]
REPEATS = 3

WORD_LENGTHS = [int(512 + step * (20_480 - 512) / 9) for step in range(10)]
INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
PASSKEY = "The pass key is {key}. Remember it. {key} is the pass key."
PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is "

TOKEN_LENGTHS = (1024, 2048, 4096)
NAMES = ("amber", "basalt", "cedar", "dahlia", "ember", "falcon", "garnet", "harbor", "indigo", "juniper", "kestrel")
OPENING = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n\n"
)
NEEDLE = "One of the special magic numbers for {name} is: {number}."
QUESTION = "What is the special magic number for {name} mentioned in the provided text?"
PREFIX = "The special magic number for {name} mentioned in the provided text is"
TURNS = 4

CODES = (  # sentences in several wordings; the prompt ends right before the code
    "In the ledger of the {name} house the missing letter has the number {code}.",
    "She had been told that the key of the {name} cabinet was marked {code}, and she never forgot it.",
    "The traveller who took the {name} coach was given the ticket {code} and a seat by the window.",
    "At the bank of Bath the {name} account is kept under the number {code}.",
    "Whoever writes to the {name} office must put on the cover {code} before the name of the clerk.",
)


class Niah:
    """The suite; see `Suite`."""

    name = "niah"
    tasks = ("passkey", "passkey_tokens", "passkey_turns", "code")

    def samples(self, request: Request) -> Iterator[Sample | Fault]:
        """Return `num_samples` (3) samples for every depth at each length.

        Without tasks `passkey_tokens`, for parity `passkey`, else for a model without a chat template `code`.

        Raises:
            InputError: an unknown task, an empty haystack or, while iterating, a length with no room for any of it.
        """
        for task in request.tasks:
            if task not in self.tasks:
                raise InputError(f"niah has no task {task!r}; choose from {', '.join(self.tasks)}.")
        ours = "passkey_tokens" if request.tokenizer.chat_template is not None else "code"
        names = request.tasks or ["passkey" if request.parity else ours]
        return self._make(names, request, split_words(request.haystack))

    def score(self, sample: Sample, turn: int, prediction: str) -> Mapping[str, float]:
        """Say whether the number is in the answer, both normalized."""
        gold = normalize_english(sample.turns[turn].answers[0])
        return {"score": float(gold in normalize_english(prediction))}

    def _make(self, names: Sequence[str], request: Request, words: Sequence[str]) -> Iterator[Sample]:
        for name in names:
            make, lengths = MAKERS[name]
            for length in request.lengths or lengths:
                for repeat, step in product(range(request.num_samples or REPEATS), range(len(DEPTHS))):
                    generator = random.Random(request.seed + len(DEPTHS) * repeat + step)
                    yield make(f"{length}-{repeat}-{step}", request, words, generator, length, DEPTHS[step])


def _passkey(
    id: str, request: Request, words: Sequence[str], generator: random.Random, length: int, depth: float
) -> Sample:
    """Return a sample in the published form, whose prose is always the text's first words."""
    key = "".join(generator.choices(string.digits, k=7))
    content = plant(take_words(words, 0, length), PASSKEY.format(key=key), depth)
    turn = Turn(PASSKEY_QUESTION, (key,), max_new_tokens=128)
    return Sample(id, Niah.name, "passkey", f"{INSTRUCTION}{content} ", (turn,), chat=False, length=length, depth=depth)


def _passkey_tokens(
    id: str, request: Request, words: Sequence[str], generator: random.Random, length: int, depth: float
) -> Sample:
    """Return a sample in our form: prose from anywhere in the text; prompt and answer fill `length` tokens."""
    name, number = generator.choice(NAMES), _number(generator)
    start = generator.randrange(len(words))
    turn = _ask(name, number)

    def make(size: int) -> Sample:
        content = plant(take_words(words, start, size), NEEDLE.format(name=name, number=number), depth)
        context = f"{OPENING}{content}\n\n"
        return Sample(id, Niah.name, "passkey_tokens", context, (turn,), chat=True, length=length, depth=depth)

    return fill(make, request.tokenizer, smallest=1, largest=length, length=length)


def _passkey_turns(
    id: str, request: Request, words: Sequence[str], generator: random.Random, length: int, depth: float
) -> Sample:
    """Return a sample with a number in each quarter of the prose, at its `depth`, asked for in random order."""
    names = generator.sample(NAMES, TURNS)
    numbers = [_number(generator) for _ in names]
    start = generator.randrange(len(words))
    turns = [_ask(name, number) for name, number in zip(names, numbers, strict=True)]
    generator.shuffle(turns)

    def make(size: int) -> Sample:
        content = take_words(words, start, size)
        for quarter in reversed(range(TURNS)):  # the last needle goes in first, so that the other places stay right
            needle = NEEDLE.format(name=names[quarter], number=numbers[quarter])
            content.insert(int(size * (quarter + depth) / TURNS), f"{needle} ")
        context = f"{OPENING}{''.join(content).strip()}\n\n"
        return Sample(id, Niah.name, "passkey_turns", context, turns, chat=True, length=length)

    return fill(make, request.tokenizer, smallest=1, largest=length, length=length)


def _code(
    id: str, request: Request, words: Sequence[str], generator: random.Random, length: int, depth: float
) -> Sample:
    """Return a sentence to complete, in one of several wordings; the prose starts anywhere in the text."""
    sentence = generator.choice(CODES).replace("{name}", generator.choice(NAMES))
    code = str(generator.randrange(10_000, 100_000))
    start = generator.randrange(len(words))
    turn = Turn("\n\n", (code,), max_new_tokens=10, answer_prefix=sentence.partition(" {code}")[0])

    def make(size: int) -> Sample:
        context = plant(take_words(words, start, size), sentence.format(code=code), depth)
        return Sample(id, Niah.name, "code", context, (turn,), chat=False, length=length, depth=depth)

    return fill(make, request.tokenizer, smallest=1, largest=length, length=length)


def _number(generator: random.Random) -> str:
    return str(generator.randrange(1_000_000, 10_000_000))


def _ask(name: str, number: str) -> Turn:
    return Turn(QUESTION.format(name=name), (number,), max_new_tokens=24, answer_prefix=PREFIX.format(name=name))


MAKERS = {  # and its lengths if the user gives none
    "passkey": (_passkey, WORD_LENGTHS),
    "passkey_tokens": (_passkey_tokens, TOKEN_LENGTHS),
    "passkey_turns": (_passkey_turns, TOKEN_LENGTHS),
    "code": (_code, TOKEN_LENGTHS),
}


SUITE = Niah()
