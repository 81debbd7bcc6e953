import json
import random
from collections import Counter
from pathlib import Path

import pytest

from eval_inputs import byte_tokenizer, make_request
from rocketkv.errors import InputError
from rocketkv.eval.data.dialogue import encode
from rocketkv.eval.data.haystack import default_text
from rocketkv.eval.data.samples import Sample
from rocketkv.eval.suites.base import Request
from rocketkv.eval.suites.ruler import SUITE, TASKS
from rocketkv.eval.suites.ruler_tasks import Draft, Material
from rocketkv.hf.models import LoadedModel

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Town {town} lies by river {river}.",
                    "qas": [
                        {
                            "question": f"Which river is by {town}?",
                            "answers": [{"text": river}],
                            "is_impossible": False,
                        },
                        {"question": "Who?", "answers": [], "is_impossible": True},
                    ],
                }
                for town, river in towns
            ]
        }
        for towns in ([("Aa", "Rea"), ("Bee", "Tay")], [("Cee", "Ouse"), ("Dee", "Nene")])
    ]
}
HOTPOT = [
    {
        "question": "Which is older?",
        "answer": "Elm",
        "context": [["Elm", ["Elm is old.", " Very."]], ["Oak", ["New."]]],
    },
    {"question": "Which is newer?", "answer": "Ash", "context": [["Ash", ["Newest."]], ["Yew", ["Old."]]]},
]


def ask(loaded: LoadedModel, **changes: object) -> list[Sample]:
    given = {"tasks": (), "lengths": (1024,), "num_samples": 2, "seed": 42, "data": None, "parity": False}
    return list(SUITE.samples(Request(loaded.tokenizer, haystack=default_text(), **given | changes)))


def draw(task: str, size: int, length: int = 2048) -> Draft:
    words = ["Alpha ", "beta. ", "Gamma ", "delta. "]
    return TASKS[task][0].draw(random.Random(7), size, Material(words, 0, length))


def prompt(draft: Draft) -> str:
    return draft.context + draft.question + draft.answer_prefix


def test_every_task_fills_its_length_and_holds_its_answers(smollm2: LoadedModel) -> None:
    samples = ask(smollm2, lengths=[1024, 2048])
    assert len(samples) == len({(s.task, s.id) for s in samples}) == 11 * 2 * 2
    for sample in samples:
        (turn,) = sample.turns
        assert sample.length is not None
        needed = encode(smollm2.tokenizer, sample, "multi_turn").needed_tokens(sample.turns)
        assert 0.9 * sample.length <= needed <= sample.length, sample.task
        assert all(answer in sample.context for answer in turn.answers), sample.task
        assert turn.answer_prefix == turn.answer_prefix.strip()
        assert (sample.chat, turn.max_new_tokens) == (True, TASKS[sample.task][1])
        assert SUITE.score(sample, 0, " ".join(turn.answers).upper()) == {"score": 1.0}
        assert SUITE.score(sample, 0, turn.answers[0]) == {"score": 1 / len(turn.answers)}
        assert SUITE.score(sample, 0, "none") == {"score": 0.0}


def test_samples_are_the_same_again_and_do_not_depend_on_how_many_are_made(smollm2: LoadedModel) -> None:
    assert ask(smollm2) == ask(smollm2)
    some = [s for s in ask(smollm2) if s.id.endswith("-0")]
    assert some == ask(smollm2, num_samples=1)
    assert some != ask(smollm2, num_samples=1, seed=43)


def test_parity_takes_the_prose_from_its_start_and_keeps_the_spaces_of_the_answer_prefix(smollm2: LoadedModel) -> None:
    first, second = ask(smollm2, tasks=["niah_single_2"], parity=True)
    beginning = " ".join(default_text().split()[:40])
    assert beginning in first.context
    assert beginning in second.context
    assert first.turns[0].answer_prefix.startswith(" The special")
    assert len(ask(smollm2, tasks=["niah_single_1"], lengths=[400], num_samples=None, parity=True)) == 50


def test_one_needle_to_the_letter() -> None:
    draft = draw("niah_single_1", 4)
    (value,) = draft.answers
    key = draft.question.split(" for ")[1].split(" mentioned")[0]
    lines = [NOISE] * 4
    assert draft.depth is not None
    lines.insert(int(draft.depth * 4), f"One of the special magic numbers for {key} is: {value}.")
    assert prompt(draft) == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n" + "\n".join(lines) + "\n"
        f"What is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )


def test_several_needles_to_the_letter() -> None:
    draft = draw("niah_multiquery", 4)
    keys = draft.question.split(" for ")[1].split(" mentioned")[0]
    first, second, third, fourth = keys.replace("and ", "").split(", ")
    assert keys == f"{first}, {second}, {third}, and {fourth}"
    for key, value in zip((first, second, third, fourth), draft.answers, strict=True):
        assert f"One of the special magic numbers for {key} is: {value}." in draft.context
    assert draft.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    assert draft.question == f"What are all the special magic numbers for {keys} mentioned in the provided text?"
    assert draft.answer_prefix == f" The special magic numbers for {keys} mentioned in the provided text are"


def test_needles_stand_between_sentences_of_prose() -> None:
    draft = draw("niah_multivalue", 8)
    prose = draft.context.split("\n")[1]
    for value in draft.answers:
        before, after = prose.split(f"is: {value}.")
        assert before.rpartition("One of")[0].rstrip()[-1:] in ("", ".")
        assert after.lstrip()[:1] in ("", "A", "G", "O")
    assert prose.count("Alpha beta.") == prose.count("Gamma delta.") == 2
    assert "  " not in prose


def test_needles_among_needles_differ() -> None:
    draft = draw("niah_multikey_3", 30)
    lines = draft.context.split("\n")[1:-1]
    assert len(set(lines)) == 31
    assert all(line.startswith("One of the special magic uuids for ") for line in lines)
    assert sum(draft.answers[0] in line for line in lines) == 1


def test_variable_tracking_follows_one_chain_after_an_example() -> None:
    draft = draw("vt", 12)
    example, _, asked = draft.context.partition("\n\nMemorize")
    value = draft.question.split(" value ")[1].split()[0]
    lines = asked.split("\n\n", 1)[1].split("\n")[:-1]
    a, b, c, d, e = draft.answers
    assert [line for line in lines if line != NOISE] == [
        f"VAR {a} = {value}",
        *(f"VAR {new} = VAR {old} " for new, old in ((b, a), (c, b), (d, c), (e, d))),
    ]
    assert lines.count(NOISE) == 12
    assert all(len(name) == 5 for name in draft.answers)
    assert asked.startswith(" and track the chain(s) of variable assignment hidden in the following text.\n\n")
    assert draft.question == f"Question: Find all variables that are assigned the value {value} in the text above."
    assert draft.answer_prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"5 variables are assgined the value {value}, they are: "
    )
    shown = example.split(" value ")[2].split(", they are:  ")[1].split()
    assert [len(name) for name in shown] == [3] * 5
    assert all(f"VAR {name} = " in example for name in shown)


@pytest.mark.parametrize(("length", "common", "other", "shown"), [(2048, 6, 1, (3, 1, 20)), (4096, 30, 3, (10, 3, 40))])
def test_common_words_are_the_common_ones(length: int, common: int, other: int, shown: tuple[int, int, int]) -> None:
    draft = draw("cwe", 25, length)
    start = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n1. "
    )
    _, example, asked = draft.context.split(start)
    listed, after = asked.removesuffix("\n"), " Answer: The top 10 words that appear most often in the list are:"
    words = Counter(part.rpartition(" ")[0] if part[-1].isdigit() else part for part in listed.split(". "))
    assert {word for word, count in words.items() if count == common} == set(draft.answers)
    assert Counter(words.values()) == {common: 10, other: 15}
    assert draft.question == "Question: What are the 10 most common words in the above list?"
    assert draft.answer_prefix == after
    text, answered = example.split(f"\n{draft.question}{after} 1. ")
    counts = Counter(part.rpartition(" ")[0] if part[-1].isdigit() else part for part in text.split(". "))
    assert len(counts) == shown[2]
    answers = [part.rpartition(" ")[0] if part[-1].isdigit() else part for part in answered.rstrip("\n").split(". ")]
    assert [counts[word] for word in answers] == [shown[0]] * 10
    assert set(counts.values()) == set(shown[:2])


def test_frequent_words_are_ranks_two_to_four_behind_the_dots() -> None:
    draft = draw("fwe", 80, length=1024)
    start = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    counts = Counter(draft.context.removeprefix(start).split())
    ranked = counts.most_common()
    assert ranked[0] == ("...", 48)
    assert [word for word, _ in ranked[1:4]] == list(draft.answers)
    assert ranked[3][1] > ranked[4][1]
    assert draft.question == (
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    assert (
        draft.answer_prefix
        == " Answer: According to the coded text above, the three most frequently appeared words are:"
    )


def test_questions_over_documents_take_related_ones_first(smollm2: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    (first, *others) = ask(smollm2, tasks=["qa_1"], data=tmp_path, num_samples=9, parity=True, lengths=[190])
    task = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    river = {s.turns[0].question.split("by ")[1]: s.turns[0].answers for s in (first, *others)}
    assert river == {"Aa?": ("Rea",), "Bee?": ("Tay",), "Cee?": ("Ouse",), "Dee?": ("Nene",)}
    assert first.context.startswith(f"{task}\n\nThe following are given documents.\n\nDocument 1:\nTown ")
    assert first.turns[0].question == f"{task}\n\nQuestion: Which river is by Aa?"
    assert first.turns[0].answer_prefix == " Answer:"
    documents = first.context.split("\n\n")[2:-1]
    assert {"Town Aa lies by river Rea.", "Town Bee lies by river Tay."} <= {d.split("\n")[1] for d in documents}
    assert SUITE.score(first, 0, "the rea") == {"score": 1.0}


def test_hotpot_documents_carry_their_titles(smollm2: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "hotpot.json").write_text(json.dumps(HOTPOT))
    first, second = ask(smollm2, tasks=["qa_2"], data=tmp_path / "hotpot.json", lengths=[300], parity=True)
    assert "Elm\nElm is old. Very.\n\n" in first.context
    assert "Document 4:\n" in first.context
    assert (first.turns[0].answers, second.turns[0].answers) == (("Elm",), ("Ash",))
    tasks = {s.task for s in ask(smollm2, data=tmp_path, num_samples=1)}
    assert tasks == set(TASKS) - {"qa_1"}


def test_real_squad_questions_are_answered_by_their_prompt(smollm2: LoadedModel, shared: Path) -> None:
    samples = ask(smollm2, tasks=["qa_1"], data=shared / "data", num_samples=5)
    for sample in samples:
        assert all(answer in sample.context for answer in sample.turns[0].answers)
        needed = encode(smollm2.tokenizer, sample, "multi_turn").needed_tokens(sample.turns)
        assert 600 < needed <= 1024
    assert len({s.context for s in samples}) == 5


def test_requests_that_make_no_sense_are_refused(smollm2: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ruler has no task 'niah'; choose from niah_single_1"):
        ask(smollm2, tasks=["niah"])
    with pytest.raises(InputError, match="ruler's qa_2 needs a HotpotQA file"):
        ask(smollm2, tasks=["vt", "qa_2"])
    with pytest.raises(InputError, match="does not exist"):
        ask(smollm2, data=tmp_path / "nothing")
    with pytest.raises(InputError, match="length=100 is too short for vt of ruler"):
        ask(smollm2, tasks=["vt"], lengths=[100])
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(InputError, match=r"torn\.json cannot be read"):
        ask(smollm2, data=tmp_path)


def test_a_base_model_completes_the_answer_on_a_new_line() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    request = make_request(
        tokenizer=tokenizer, tasks=["niah_single_1"], lengths=[2048], num_samples=1, haystack=default_text()
    )
    (sample,) = SUITE.samples(request)
    assert isinstance(sample, Sample)
    assert not sample.chat
    (piece,) = encode(tokenizer, sample, "multi_turn").pieces
    assert "mentioned in the provided text?\nThe special magic number for" in tokenizer.decode(piece)
