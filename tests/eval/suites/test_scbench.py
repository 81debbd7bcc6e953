"""SCBench's scores, the data's rows, and generated ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval_inputs import make_request, write_lines
from rocketkv.errors import InputError
from rocketkv.eval.data.samples import Fault, Sample
from rocketkv.eval.suites.scbench import SUITE, TASKS
from scbench_rows import F1, F2, PLAIN, ROWS, read, read_one, row, turn


def test_answer_lengths_and_subtasks(tmp_path: Path) -> None:
    lengths = {task: [turn.max_new_tokens for turn in read_one(tmp_path, task).turns] for task in TASKS}
    assert lengths == {
        "scbench_kv": [150] * 3,
        "scbench_prefix_suffix": [150] * 3,
        "scbench_vt": [30] * 2,
        "scbench_repoqa": [1024] * 2,
        "scbench_qa_eng": [40] * 3,
        "scbench_qa_chn": [40] * 3,
        "scbench_choice_eng": [40] * 2,
        "scbench_many_shot": [10] * 2,
        "scbench_summary": [200] * 3,
        "scbench_mf": [5] * 3,
        "scbench_summary_with_needles": [800, 15],
        "scbench_repoqa_and_kv": [1024, 80],
    }
    subtasks = [turn.subtask for turn in read_one(tmp_path, "scbench_repoqa_and_kv").turns]
    assert subtasks == ["scbench_repoqa", "scbench_kv"]


def test_the_first_answer_is_what_a_later_turn_sees_of_it(tmp_path: Path) -> None:
    assert read_one(tmp_path, "scbench_vt").turns[0].answers == ("['AB', 'CD']", "AB", "CD")  # as a list is printed
    assert read_one(tmp_path, "scbench_choice_eng").turns[1].answers == ("z", "D")
    assert read_one(tmp_path, "scbench_mf").turns[0].answers == ("9",)


@pytest.mark.parametrize(
    ("task", "number", "prediction", "expected"),
    [
        ("scbench_kv", 0, "it is gold.", {"score": 1.0}),
        ("scbench_kv", 0, "it is Gold.", {"score": 0.0}),  # case counts
        ("scbench_prefix_suffix", 1, "", {"score": 0.0}),
        ("scbench_vt", 0, "ab, xy", {"score": 0.5}),  # in any case; the printed list is no reference
        ("scbench_vt", 0, "AB CD", {"score": 1.0}),
        ("scbench_qa_eng", 0, "GOLDEN", {"score": 1.0}),
        ("scbench_qa_eng", 0, "silver", {"score": 0.0}),
        ("scbench_qa_chn", 0, "gold", {"score": 1.0, "released": 2 / 5}),  # the best single character of 4
        ("scbench_qa_chn", 0, "go", {"score": 2 / 3, "released": 2 / 3}),
        ("scbench_qa_chn", 0, "", {"score": 0.0, "released": 0.0}),
        ("scbench_choice_eng", 0, "A", {"score": 1.0}),
        ("scbench_choice_eng", 1, "A", {"score": 0.0}),
        ("scbench_many_shot", 0, "(a)", {"score": 1.0, "released": 1.0}),
        ("scbench_many_shot", 0, "(B)", {"score": 0.0, "released": 1.0}),  # its brackets are found
        ("scbench_many_shot", 0, "b", {"score": 0.0, "released": 0.0}),
        ("scbench_summary", 0, "gold silver", {"score": 2 / 3}),
        ("scbench_mf", 0, "9.0", {"score": 1.0}),
        ("scbench_mf", 0, "10", {"score": 0.0}),
        ("scbench_summary_with_needles", 0, "gold", {"score": 1.0}),
        ("scbench_summary_with_needles", 1, "the key: 12345.", {"score": 1.0}),
        ("scbench_summary_with_needles", 1, "1234", {"score": 0.0}),
        ("scbench_repoqa", 0, f"```python\n{F1}\n```", {"score": 1.0}),
        ("scbench_repoqa", 0, f"```python\n{F2}\n```", {"score": 0.0}),
        ("scbench_repoqa_and_kv", 0, F1, {"score": 1.0}),
        ("scbench_repoqa_and_kv", 1, "xvx", {"score": 1.0}),
    ],
)
def test_scores(task: str, number: int, prediction: str, expected: dict[str, float], tmp_path: Path) -> None:
    sample = read_one(tmp_path, task)
    assert SUITE.score(sample, number, prediction) == {name: pytest.approx(value) for name, value in expected.items()}


def test_functions_are_told_apart_over_all_rows_of_a_repository(tmp_path: Path) -> None:
    other = F1.replace("total", "amount")
    rows = [
        row(turn("ONE", F1, name="first"), repo="r", lang="python"),
        row(turn("TWO", F2, name="second"), repo="r", lang="python"),
        row(turn("ONE", other, name="first"), repo="r", lang="python"),  # of the same name: right as well
        row(turn("ONE", "def third(): pass", name="third"), repo="other", lang="python"),
    ]
    samples = [sample for sample in read(tmp_path, "scbench_repoqa", rows, num_samples=2) if isinstance(sample, Sample)]
    assert [sample.turns[0].options for sample in samples] == [(F1, F2, other)] * 2
    assert [sample.turns[0].answers for sample in samples] == [(F1, other), (F2,)]
    assert [sample.id for sample in samples] == ["0", "1"]
    assert SUITE.score(samples[0], 0, other) == {"score": 1.0}
    assert SUITE.score(samples[1], 0, other) == {"score": 0.0}


@pytest.mark.parametrize(
    ("task", "broken", "reason"),
    [
        ("scbench_kv", "{", "is no JSON"),
        ("scbench_kv", row(), "has 'multi_turns' that are no list of at least one object"),
        ("scbench_kv", {"multi_turns": [turn("ONE")]}, "has no 'input'"),
        ("scbench_kv", row(turn("ONE"), context=["a"]), "has list as 'context' where str is expected"),
        ("scbench_kv", row({"answer": "x"}), "has no 'input'"),
        ("scbench_kv", row(turn("ONE", "")), "has an empty 'answer'"),
        ("scbench_kv", row(turn("ONE", None)), "has NoneType as 'answer' where str or int or float is expected"),
        ("scbench_vt", row(turn("ONE", "AB")), "has str as 'answer' where list is expected"),
        (
            "scbench_choice_eng",
            row(turn("ONE", "v", options=list("wxyz"))),
            "has the answer 'v', which is none of its 4",
        ),
        ("scbench_choice_eng", row(turn("ONE", "w", options=["w"])), "has .* as 'options' where at least 4"),
        (
            "scbench_mf",
            row(turn("The sum is", "many"), context=[1]),
            "has 'many' as 'answer' where a number is",
        ),
        ("scbench_mf", row(turn("Sum?", 1), context=[1]), "asks 'Sum.' where 'The ... is' is expected"),
        ("scbench_repoqa", row(turn("ONE", F1, name="first"), lang="perl"), "has 'perl' as 'lang' where one of python"),
        ("scbench_repoqa", row(turn("ONE", F1), lang="python"), "has no 'name'"),
        ("scbench_repoqa_and_kv", row(turn("ONE", task="scbench_mf")), "has 'scbench_mf' as a turn's 'task' where one"),
    ],
)
def test_a_broken_row_is_named_and_the_others_are_read(task: str, broken: Any, reason: str, tmp_path: Path) -> None:
    first, fault, last = read(tmp_path, task, [ROWS[task], broken, ROWS[task]])
    assert isinstance(first, Sample)
    assert isinstance(last, Sample)
    assert isinstance(fault, Fault)
    assert fault.source == f"{task}.jsonl, line 2"
    assert re.match(reason, fault.reason)


def generated(task: str, length: int, **changes: Any) -> list[Sample]:
    request = make_request(tasks=(task,), lengths=(length,), **{"num_samples": 3} | changes)
    samples = list(SUITE.samples(request))
    assert all(isinstance(sample, Sample) for sample in samples)
    return [sample for sample in samples if isinstance(sample, Sample)]


@pytest.mark.parametrize("task", ["scbench_kv", "scbench_prefix_suffix", "scbench_vt"])
def test_generated_rows_are_as_long_as_asked_and_the_same_again(task: str) -> None:
    for length in (2500, 9000):
        samples = generated(task, length)
        head = len("Extract the value corresponding to the specified key in the JSON object below.\n\n")
        for sample in samples:
            num_bytes = len(sample.context.encode()) - 2 - (head if task == "scbench_kv" else 0)  # a token each
            assert length - 120 < num_bytes <= length
            assert sample.length == length
        assert len({sample.context for sample in samples}) == 3
        assert generated(task, length) == samples
        assert generated(task, length, seed=1)[0].context != samples[0].context
        assert generated(task, length, num_samples=2) == samples[:2]


def test_generated_key_value_pairs_hold_the_answers() -> None:
    for sample in generated("scbench_kv", 4000):
        pairs = json.loads(sample.context.partition("below.\n\n")[2])
        for asked in sample.turns:
            (key,) = re.findall(r'^Key: "(.+)"\nThe value associated with the specified key is:$', asked.question)
            assert asked.answers == (pairs[key],)
        assert len({asked.question for asked in sample.turns}) == len(sample.turns) == 5


def test_generated_words_are_told_by_prefix_and_suffix() -> None:
    for sample in generated("scbench_prefix_suffix", 4000):
        words = json.loads(sample.context.removeprefix("Dictionary = "))
        assert all(65 <= len(word) < 123 for word in words)
        for asked in sample.turns:
            prefix, suffix = re.findall(r"^Prefix: (\w+); Suffix: (\w+)\. The word with both", asked.question)[0]
            assert [word for word in words if word.startswith(prefix) and word.endswith(suffix)] == list(asked.answers)


def test_generated_variables_follow_from_the_value() -> None:
    for sample in generated("scbench_vt", 4000):
        assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.context))
        assert len(assigned) == 6
        for asked in sample.turns:
            (value,) = re.findall(r"assigned the value (\d+) in", asked.question)
            expected = []
            known = {value}
            for name, source in assigned.items():  # in order of appearance
                if source in known:
                    known.add(name)
                    expected.append(name)
            assert asked.answers == (str(expected), *expected)
            assert len(expected) == 3
            assert SUITE.score(sample, sample.turns.index(asked), " ".join(expected)) == {"score": 1.0}


def test_without_data_there_are_three_tasks() -> None:
    samples = list(SUITE.samples(make_request(num_samples=1, lengths=(3000,))))
    tasks = [sample.task for sample in samples if isinstance(sample, Sample)]
    assert tasks == ["scbench_kv", "scbench_prefix_suffix", "scbench_vt"]


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    write_lines(tmp_path / "scbench_kv.jsonl", [PLAIN])
    (tmp_path / "empty.jsonl").write_text("")
    for changes, message in [
        ({"mode": "single"}, "mode='single' does not exist; choose from multi_turn, multi_request"),
        ({"tasks": ("kv",)}, "scbench has no task 'kv'; choose from scbench_kv"),
        (
            {"tasks": ("scbench_kv", "scbench_mf")},
            "scbench_mf needs its data; give .* or ask only for scbench_kv",
        ),
        ({"data": tmp_path, "tasks": ("scbench_mf",)}, "has no scbench_mf.jsonl; give data that has it"),
        ({"data": tmp_path / "empty.jsonl"}, "has no scbench_kv.jsonl or "),
        ({"data": tmp_path / "absent"}, "absent does not exist"),
    ]:
        with pytest.raises(InputError, match=message):
            SUITE.samples(make_request(**changes))
    with pytest.raises(InputError, match="length=100 is too short for scbench_kv; give at least"):
        generated("scbench_kv", 100)
