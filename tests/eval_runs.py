"""A small suite, and runs of it, for the tests of the runner, the journal and the prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rocketkv import InputError
from rocketkv.eval.data.samples import Fault, Sample, Turn
from rocketkv.eval.run.journal import Journal, Shard
from rocketkv.eval.run.methods import make_arms
from rocketkv.eval.run.runner import Plan, run
from rocketkv.eval.suites.base import Request
from rocketkv.hf.models import LoadedModel

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STAMPS = ("prefill_s", "decode_s", "rows")  # what may differ from run to run
LONG = "It was the best of times, it was the worst of times, it was the age of wisdom. "


def turn(question: str, *answers: str, prefix: str = "", new: int = 6) -> Turn:
    return Turn(question, answers, new, answer_prefix=prefix)


def make_sample(number: int, turns: int = 1, chat: bool = True, length: int | None = None) -> Sample:
    asked = [turn(f" What is {number + k}?", f"gold {k}") for k in range(turns)]
    return Sample(str(number), "small", "times", f"{number}. {LONG * 3}", asked, chat, length=length)


@dataclass
class Small:
    """A suite of a few samples; a task `broken` has faults of every kind among them."""

    turns: int = 1
    name = "small"
    tasks: Sequence[str] = ("times", "broken")

    def samples(self, request: Request) -> Iterator[Sample | Fault]:
        count = request.num_samples or 6
        for number in range(count):
            yield make_sample(number, self.turns)
        if "broken" in request.tasks:
            yield Fault("rows.jsonl, line 7", "it has no context")
            yield make_sample(0, self.turns)  # the same id again
            yield replace(make_sample(100), context=LONG * 100, length=5000)  # does not fit
            yield make_sample(666)  # cannot be judged
            yield make_sample(101, self.turns)

    def score(self, sample: Sample, turn: int, prediction: str) -> Mapping[str, float]:
        if sample.id == "666":
            raise InputError("the metric needs a package")
        return {"score": float("e" in prediction)}


def request_for(loaded: LoadedModel, **changes: Any) -> Request:
    return replace(Request(loaded.tokenizer, [], [], None, 0, None, LONG, False), **changes)


def run_small(
    loaded: LoadedModel,
    folder: Path,
    *,
    methods: Sequence[str] = ("full", "rocketkv", "snapkv"),
    budgets: Sequence[int] = (64,),
    turns: int = 1,
    shard: Shard = Shard(),  # noqa: B008  # it is frozen
    seed: int = 0,
    **changes: Any,
) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """All records in the folder, and what was said of the progress."""
    said: list[tuple[int, int]] = []
    plan = Plan(Small(turns), request_for(loaded, **changes), make_arms(methods, budgets), None, shard)
    with Journal(folder, {"model": "tiny", "seed": seed}, shard, facts={"versions": {}}, command="run") as journal:
        run(loaded, plan, journal, lambda done, total: said.append((done, total)))
    return journal.records, said


def plain(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in STAMPS} for record in records]


def key(record: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(record[name] for name in ("task", "id", "method", "token_budget", "turn"))


def by_key(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return sorted(plain(records), key=lambda record: repr(key(record)))
