"""Pieces of real text of a given length, for `fidelity`."""

import gzip
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rocketkv.errors import InputError
from rocketkv.eval.run.records import Case
from rocketkv.eval.suites.base import Request
from rocketkv.hf.text import PlainText

STEPS = 256  # tokens decoded after each prefix
LENGTHS = (2048, 4096)  # lengths of prefixes in tokens, if the user gives none


@dataclass(frozen=True)
class Passage:
    """A piece of text.

    Attributes:
        case: the name in records.
        token_ids: `case.length` to prefill, then those to decode, and one more to predict. The first one begins a
            text, where the tokenizer begins texts with one.
    """

    case: Case
    token_ids: list[int]


def find_passages(request: Request, context_length: int) -> Iterator[Passage]:
    """Return passages of every text at every length, from places drawn by the seed.

    `request.data` is a text, .txt or .txt.gz, or a folder of them; without it `request.haystack` is the text.

    Raises:
        InputError: there is no text, or one is too short, or a length too long for the model.
    """
    plain = PlainText(request.tokenizer)
    for name, text in _texts(request).items():
        token_ids = plain.encode(plain.hide(text))
        for length in request.lengths or LENGTHS:
            if length + STEPS > context_length:
                raise InputError(
                    f"length={length} and {STEPS} tokens to decode do not fit in the model's {context_length} tokens; "
                    "give shorter lengths."
                )
            taken = length + STEPS + 1 - len(plain.start)
            spare = len(token_ids) - taken
            if spare < 0:
                raise InputError(f"{name} has {len(token_ids)} tokens, {-spare} too few for length={length}.")
            for number in range(request.num_samples or 1):
                start = random.Random(f"{request.seed} {name} {length} {number}").randint(0, spare)
                case = Case(name, f"{name}-{length}-{number}", length)
                yield Passage(case, plain.start + token_ids[start : start + taken])


def _texts(request: Request) -> dict[str, str]:
    """Return the texts by name."""
    if request.data is None:
        return {"haystack": request.haystack}
    paths = [request.data]
    if request.data.is_dir():
        paths = sorted(path for path in request.data.iterdir() if path.name.endswith((".txt", ".txt.gz")))
    if not paths:
        raise InputError(f"{request.data} has no .txt or .txt.gz; give a text or a folder of texts.")
    texts: dict[str, str] = {}
    for path in paths:
        name = path.name.removesuffix(".gz").removesuffix(".txt")
        if name in texts:
            raise InputError(f"{path.parent} has {name} twice, as .txt and as .txt.gz; remove one.")
        texts[name] = _read_text(path)
    return texts


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as text ({error}); give UTF-8 text, .txt or .txt.gz.") from None
