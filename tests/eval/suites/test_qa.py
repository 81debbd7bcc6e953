import gzip
import json
from pathlib import Path

import pytest

from rocketkv.errors import InputError
from rocketkv.eval.data.dialogue import encode
from rocketkv.eval.data.samples import Fault, Sample
from rocketkv.eval.suites.base import Request
from rocketkv.eval.suites.qa import SUITE
from rocketkv.hf.models import LoadedModel

LINES = {
    "prompt": "Learn.\n\nline a-b: REGISTER_CONTENT is <12>\nline c-d: REGISTER_CONTENT is <345>\n\nTell me c-d. ",
    "random_idx": ["c-d", 1],
    "expected_number": 345,
}
PAIRS = {"ordered_kv_records": [[f"k{i}", f"v{i}"] for i in range(6)], "key": "k2", "value": "v2"}


def nq(question: str, answer: str, text: str) -> dict[str, object]:
    return {"question": question, "answers": [answer], "ctxs": [{"title": "T", "text": text, "isgold": True}]}


def ask(loaded: LoadedModel, data: Path | None, **changes: object) -> list[Sample | Fault]:
    given = {"tasks": (), "lengths": (), "num_samples": None, "seed": 42, "parity": False}
    return list(SUITE.samples(Request(loaded.tokenizer, haystack="", data=data, **given | changes)))


def made(loaded: LoadedModel, data: Path, **changes: object) -> list[Sample]:
    return [sample for sample in ask(loaded, data, **changes) if isinstance(sample, Sample)]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_every_task_of_the_real_data_fills_its_length_and_holds_its_answers(smollm2: LoadedModel, shared: Path) -> None:
    samples = made(smollm2, shared / "data", lengths=[1024, 2048], num_samples=3)
    assert len(samples) == len({(s.task, s.id) for s in samples}) == 6 * 2 * 3
    for sample in samples:
        assert sample.length is not None
        assert encode(smollm2.tokenizer, sample, "multi_turn").needed_tokens(sample.turns) <= sample.length
        assert len(sample.turns) == (4 if sample.task.endswith("_turns") else 1)
        assert len({turn.question for turn in sample.turns}) == len(sample.turns)
        for index, turn in enumerate(sample.turns):
            assert turn.answers[0] in sample.context
            assert SUITE.score(sample, index, f" **{turn.answers[0]}**.") == {"score": 1.0}
            assert SUITE.score(sample, index, "I cannot say.") == {"score": 0.0}
    longest = [len(s.context) for s in samples if s.length == 2048]
    assert sum(longest) > 1.7 * sum(len(s.context) for s in samples if s.length == 1024)


def test_samples_are_the_same_again(smollm2: LoadedModel, shared: Path) -> None:
    first = ask(smollm2, shared / "data", lengths=[1024], num_samples=2)
    assert first == ask(smollm2, shared / "data", lengths=[1024], num_samples=2)
    assert first != ask(smollm2, shared / "data", lengths=[1024], num_samples=2, seed=1)


def test_real_rows_stand_as_they_are_without_lengths(smollm2: LoadedModel, shared: Path) -> None:
    file = shared / "data" / "longeval_200_lines.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        row = json.loads(next(lines))
    (sample,) = made(smollm2, file, num_samples=1)
    assert (sample.task, sample.length) == ("lines", None)
    assert sample.context + sample.turns[0].question == row["prompt"]
    assert sample.turns[0].answers == (str(row["expected_number"]),)


def test_the_gold_passage_stands_among_those_without_the_answer(smollm2: LoadedModel, tmp_path: Path) -> None:
    rows = [
        nq("who won", "Ann Lee", "In 1990 Ann Lee won."),
        nq("who lost", "Bob", "Bob lost to ann  lee, it is said."),
        nq("where", "Rome", "It was in Rome."),
    ]
    first, _, third = made(smollm2, write(tmp_path / "nq.jsonl", *rows), lengths=[400])
    assert first.context.startswith(
        "Write a high-quality answer for the given question using only the provided search results "
        "(some of which might be irrelevant).\n\nDocument [1](Title: T) "
    )
    assert first.context.count("Document [") == 2  # the second names Ann Lee as well
    assert "Bob" not in first.context
    assert third.context.count("Document [") == 3
    assert first.turns[0].question == "Who won?"
    places = [part.split("Document [")[0] for part in third.context.split("(Title: T) ")[1:]]
    assert third.depth == places.index(next(p for p in places if "Rome" in p)) / 2
    assert SUITE.score(first, 0, "it was the ann LEE!") == {"score": 1.0}
    assert SUITE.score(first, 0, "it was Ann") == {"score": 0.0}


def test_lines_count_as_numbers_not_as_digits(smollm2: LoadedModel, tmp_path: Path) -> None:
    (sample,) = made(smollm2, write(tmp_path / "lines.jsonl", LINES))
    assert sample.context + sample.turns[0].question == LINES["prompt"]
    assert sample.turns[0].answer_prefix == "The <REGISTER_CONTENT> in line c-d is"
    assert sample.depth == 1.0
    assert SUITE.score(sample, 0, " <345>.") == {"score": 1.0}
    assert SUITE.score(sample, 0, " 3456") == {"score": 0.0}


def test_pairs_are_left_out_but_never_those_asked_for(smollm2: LoadedModel, tmp_path: Path) -> None:
    data = write(tmp_path / "kv.jsonl", PAIRS)
    whole, turns = made(smollm2, data)
    opening = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
    body = "{" + ",\n ".join(f'"k{i}": "v{i}"' for i in range(6)) + "}\n\n"
    assert whole.context == turns.context == opening + body
    assert (whole.turns[0].question, whole.turns[0].answers) == ('Key: "k2"', ("v2",))
    assert len({turn.question for turn in turns.turns}) == 4
    length = encode(smollm2.tokenizer, whole, "multi_turn").needed_tokens(whole.turns)
    cut, *_ = made(smollm2, data, tasks=["kv"], lengths=[length - 5])
    kept = json.loads(cut.context.removeprefix(opening))
    assert list(kept) == sorted(kept)
    assert len(kept) < 6
    assert kept["k2"] == "v2"


def test_squad_asks_what_its_paragraphs_answer(smollm2: LoadedModel, shared: Path) -> None:
    (sample,) = made(smollm2, shared / "data", tasks=["squad_turns"], lengths=[1500], num_samples=1)
    with gzip.open(shared / "data" / "squad_dev_v2_part.json.gz", "rt") as file:
        articles = json.load(file)["data"]
    asked = {turn.question for turn in sample.turns}
    possible = {
        q["question"].strip().rstrip("?").rstrip()[1:]
        for article in articles
        for paragraph in article["paragraphs"]
        if paragraph["context"] in sample.context
        for q in paragraph["qas"]
        if not q["is_impossible"]
    }
    assert {question[1:-1] for question in asked} <= possible


def test_broken_rows_are_named_and_the_others_asked(smollm2: LoadedModel, tmp_path: Path) -> None:
    broken = [{**LINES, "expected_number": "345"}, {**LINES, "random_idx": ["x", 0]}, "[1]", "{"]
    *faults, sample = ask(smollm2, write(tmp_path / "lines.jsonl", LINES, *broken), lengths=[2048])
    assert isinstance(sample, Sample)
    assert [(fault.source, fault.reason.split(" ", 1)[0]) for fault in faults if isinstance(fault, Fault)] == [
        ("lines.jsonl, line 2", "has"),
        ("lines.jsonl, line 3", "has"),
        ("lines.jsonl, line 4", "is"),
        ("lines.jsonl, line 5", "is"),
    ]
    rows = [{**PAIRS, "key": "z"}, {**PAIRS, "ordered_kv_records": [["a", 1]]}]
    assert all(isinstance(fault, Fault) for fault in ask(smollm2, write(tmp_path / "kv.jsonl", *rows), tasks=["kv"]))
    rows = [nq("q", "the", "the"), {**nq("q", "a b", "a b"), "ctxs": [3]}]
    assert all(isinstance(fault, Fault) for fault in ask(smollm2, write(tmp_path / "nq.jsonl", *rows)))


def test_requests_that_make_no_sense_are_refused(smollm2: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="qa has no task 'squat'; choose from nq, lines"):
        ask(smollm2, tmp_path, tasks=["squat"])
    with pytest.raises(InputError, match="qa needs its data"):
        ask(smollm2, None)
    with pytest.raises(InputError, match="does not exist"):
        ask(smollm2, tmp_path / "nothing")
    with pytest.raises(InputError, match="has nothing for nq, lines, kv, squad, squad_turns, kv_turns"):
        ask(smollm2, tmp_path)
    with pytest.raises(InputError, match="has nothing for squad"):
        ask(smollm2, write(tmp_path / "kv.jsonl", PAIRS), tasks=["kv", "squad"])
    with pytest.raises(InputError, match="length=60 is too short for kv of qa"):
        ask(smollm2, tmp_path / "kv.jsonl", tasks=["kv"], lengths=[60])
