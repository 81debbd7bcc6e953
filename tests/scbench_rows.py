"""A small row of each of SCBench's tasks, and how a suite reads them from a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval_inputs import make_request, write_lines
from rocketkv.eval.data.samples import Fault, Sample
from rocketkv.eval.suites.scbench import SUITE

F1 = "def first(a, b):\n    total = a + b\n    return total * 2"
F2 = "def second(x):\n    for y in x:\n        print(y)\n    return None"


def row(*turns: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {"id": 7, "context": "CONTEXT", "multi_turns": list(turns)} | changes


def turn(text: str, answer: Any = "gold", **more: Any) -> dict[str, Any]:
    return {"input": text, "answer": answer, **more}


PLAIN = row(turn("ONE"), turn("TWO"), turn("THREE"))
ROWS: dict[str, dict[str, Any]] = {
    "scbench_kv": PLAIN,
    "scbench_prefix_suffix": PLAIN,
    "scbench_vt": {"input": "CONTEXT", "multi_turns": [turn("ONE", ["AB", "CD"]), turn("TWO", ["EF"])]},
    "scbench_repoqa": row(turn("ONE", F1, name="first"), turn("TWO", F2, name="second"), repo="r", lang="python"),
    "scbench_qa_eng": PLAIN,
    "scbench_qa_chn": PLAIN,
    "scbench_choice_eng": row(turn("ONE", "w", options=list("wxyz")), turn("TWO", "z", options=list("wxyz"))),
    "scbench_many_shot": row(turn("ONE", "(A)"), turn("TWO", "(B)")),
    "scbench_summary": PLAIN,
    "scbench_mf": row(
        turn("The largest number is", 9), turn("The median is", 5), turn("The smallest is", 1), context=[1, 5, 9]
    ),
    "scbench_summary_with_needles": row(
        turn("ONE", task="scbench_summary"), turn("TWO", "12345", task="scbench_passkey")
    ),
    "scbench_repoqa_and_kv": row(
        turn("ONE", F1, name="first", task="scbench_repoqa"),
        turn("TWO", "v", task="scbench_kv"),
        repo="r",
        lang="python",
    ),
}


def read(folder: Path, task: str, rows: Sequence[Any], **changes: Any) -> list[Sample | Fault]:
    path = write_lines(folder / f"{task}.jsonl", rows)
    return list(SUITE.samples(make_request(data=path, **changes)))


def read_one(folder: Path, task: str, **changes: Any) -> Sample:
    (sample,) = read(folder, task, [ROWS[task]], **changes)
    assert isinstance(sample, Sample)
    return sample
