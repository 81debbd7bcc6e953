"""Records of answers: how they are read from the files of a run, and which lines are none."""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from rocketkv.errors import InputError

Record = dict[str, Any]


class Case(NamedTuple):
    """One sample of a run."""

    task: str
    id: str
    length: int | None


def digest(prompt: object) -> str:
    """Return a few letters that tell one prompt, in token ids, from another."""
    return sha256(json.dumps(prompt).encode()).hexdigest()[:12]


def find_records(folder: Path) -> list[Path]:
    """Return the record files of a run, packed by gzip or not."""
    return sorted([*folder.glob("records*.jsonl"), *folder.glob("records*.jsonl.gz")])


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Return the records of several files, packed by gzip or not, without answers of which a turn is missing.

    Raises:
        InputError: a line is no record.
    """
    return without_torn([record for path in paths for record in read_lines(path)])


def read_lines(path: Path) -> list[Record]:
    """Return the whole lines of a record file.

    Raises:
        InputError: one is no record.
    """
    records = []
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); give another folder.") from None
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            record = parse(line)
            wrong = [f"{name}={record[name]!r}" for name, fits in _FIELDS.items() if not fits(record[name])]
            given = [(name, depth) for name, depth in _FIGURES.items() if record.get(name) is not None]
            wrong += [f"{name}={record[name]!r}" for name, depth in given if not _is_figure(record[name], depth)]
            wrong += ["turn >= turns"] if not wrong and record["turn"] >= record["turns"] else []
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number} is no record of an evaluation; give another folder.") from None
        if wrong:
            raise InputError(
                f"{path}, line {number} is no record of an evaluation ({wrong[0][:80]}); give another folder."
            )
        records.append(record)
    return records


def parse(content: str | bytes) -> Any:
    """Return the value of a JSON text, if the value can be written as JSON again.

    Raises:
        ValueError: the text is no JSON, is nested too deeply, or has half a character.
    """
    try:
        value = json.loads(content)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


_TOO_LARGE = 2**63


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _TOO_LARGE


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE  # nor NaN


def _is_figure(value: object, depth: int) -> bool:
    """Say whether a value is a number, NaN and infinity included, or, by `depth`, a list or an even table of such."""
    if depth == 0:
        return _is_number(value) or (isinstance(value, float) and not abs(value) < math.inf)
    if not isinstance(value, list) or not all(_is_figure(each, depth - 1) for each in value):
        return False
    return depth == 1 or len({len(each) for each in value}) <= 1


def _is_scores(value: object) -> bool:
    return isinstance(value, dict) and "score" in value and all(map(_is_number, value.values()))


def _or_none(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or fits(value)


_FIELDS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("suite", "task", "id", "method", "prediction", "prompt"), _is_text),
    **dict.fromkeys(("turn", "turns", "prompt_tokens", "new_tokens", "kv_bytes", "group_size"), _is_count),
    **dict.fromkeys(("length", "token_budget", "read_bytes"), _or_none(_is_count)),
    **dict.fromkeys(("prefill_s", "decode_s"), _is_number),
    "depth": _or_none(_is_number),
    "scores": _is_scores,
    "agrees": lambda value: value is None or isinstance(value, bool),
    "rows": lambda value: _is_count(value) and value != 0,
}
_FIGURES = {"agreement": 0, "kl": 0, "perplexity": 0, "output_error": 1, "recall": 1, "kept": 2}  # of fidelity alone


def without_torn(records: Sequence[Record]) -> list[Record]:
    """Return the records without answers of which a turn is missing, as a full disk leaves them."""
    turns: dict[tuple[object, ...], set[int]] = {}
    for record in records:
        turns.setdefault(_answer(record), set()).add(record["turn"])
    return [record for record in records if len(turns[_answer(record)]) == record["turns"]]


def case_of(record: Record) -> Case:
    """Name the sample that a record is about."""
    return Case(record["task"], record["id"], record["length"])


def _answer(record: Record) -> tuple[object, ...]:
    return *case_of(record), record["method"], record["token_budget"]
