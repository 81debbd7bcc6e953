import re
from itertools import islice

import pytest

from eval_inputs import byte_tokenizer, make_request
from rocketkv.errors import InputError
from rocketkv.eval.data.dialogue import encode
from rocketkv.eval.data.haystack import default_text, plant, split_sentences, split_words, take_words
from rocketkv.eval.data.samples import Sample
from rocketkv.eval.suites.base import Request
from rocketkv.eval.suites.niah import INSTRUCTION, OPENING, SUITE
from rocketkv.hf.models import LoadedModel

NUMBERS = "one two\nthree four five six seven eight nine ten"


def ask(loaded: LoadedModel, haystack: str = "", **changes: object) -> list[Sample]:
    given = {"tasks": (), "lengths": (), "num_samples": None, "seed": 42, "data": None, "parity": False}
    return list(SUITE.samples(Request(loaded.tokenizer, haystack=haystack or default_text(), **given | changes)))


def test_the_published_passkey_to_the_letter(smollm2: LoadedModel) -> None:
    samples = ask(smollm2, NUMBERS, tasks=["passkey"], lengths=[4], num_samples=1)
    sample = samples[5]
    (key,) = sample.turns[0].answers
    assert (sample.context + sample.turns[0].question) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n"
        f"one two The pass key is {key}. Remember it. {key} is the pass key. three four "
        "\nWhat is the pass key? The pass key is "
    )
    assert len(key) == 7
    assert key.isdigit()
    assert not sample.chat
    assert sample.turns[0].max_new_tokens == 128
    contents = [s.context.removeprefix(INSTRUCTION).partition("The pass key") for s in samples]
    assert [len(before.split()) for before, _, _ in contents] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_parity_is_ten_lengths_in_words_ten_depths_three_times(smollm2: LoadedModel) -> None:
    samples = ask(smollm2, parity=True)
    assert len(samples) == len({s.id for s in samples}) == 300
    assert {s.task for s in samples} == {"passkey"}
    lengths = sorted({s.length for s in samples if s.length})
    assert (lengths[0], lengths[-1], len(lengths)) == (512, 20_480, 10)
    assert sorted({s.depth for s in samples if s.depth is not None}) == pytest.approx([i / 9 for i in range(10)])
    needle = 12  # words of it
    assert len(samples[0].context.removeprefix(INSTRUCTION).split()) == 512 + needle


@pytest.mark.parametrize("length", [300, 1024])
def test_ours_fills_the_length_in_tokens_and_hides_the_answer_at_its_depth(smollm2: LoadedModel, length: int) -> None:
    samples = ask(smollm2, lengths=[length], num_samples=2)
    assert len(samples) == len({s.id for s in samples}) == 20
    for sample in samples:
        (turn,) = sample.turns
        assert 0.97 * length <= encode(smollm2.tokenizer, sample, "multi_turn").needed_tokens(sample.turns) <= length
        before, after = sample.context.removeprefix(OPENING).split(f" is: {turn.answers[0]}.")
        place = len(before.split()) - 8  # words of the needle before its number
        assert sample.depth is not None
        assert place == int(sample.depth * (place + len(after.split())))
        assert turn.answer_prefix.startswith("The special magic number for ")
        assert sample.chat


@pytest.mark.parametrize("length", [400, 1024])
def test_needles_of_several_turns_stand_in_a_quarter_each(smollm2: LoadedModel, length: int) -> None:
    samples = ask(smollm2, tasks=["passkey_turns"], lengths=[length], num_samples=2)
    assert len(samples) == len({s.id for s in samples}) == 20
    orders = set()
    for sample, step in zip(samples, 2 * list(range(10)), strict=True):
        assert 0.95 * length <= encode(smollm2.tokenizer, sample, "multi_turn").needed_tokens(sample.turns) <= length
        needles = re.findall(r"One of the special magic numbers for (\w+) is: (\d{7})\. ?", sample.context)
        asked = [(turn.question.removesuffix(" mentioned in the provided text?").split()[-1], *turn.answers)
                 for turn in sample.turns]  # fmt: skip
        assert sorted(needles) == sorted(asked)
        assert len(dict(needles)) == 4
        orders.add(tuple(needles.index(needle) for needle in asked))
        prose = re.split(r"One of the special magic numbers for \w+ is: \d{7}\. ?", sample.context[len(OPENING) :])
        counts = [len(part.split()) for part in prose]
        places = [int(sum(counts) * (quarter + step / 9) / 4) for quarter in range(4)]
        assert [sum(counts[: i + 1]) for i in range(4)] == places
        assert sample.depth is None
    assert len(orders) > 1


def test_a_code_is_asked_for_by_the_beginning_of_its_sentence(smollm2: LoadedModel) -> None:
    samples = ask(smollm2, tasks=["code"], lengths=[400], num_samples=3)
    assert len(samples) == len({s.id for s in samples}) == 30
    for sample in samples:
        (turn,) = sample.turns
        (code,) = turn.answers
        assert (len(code), code.isdigit(), sample.chat) == (5, True, False)
        assert 0.95 * 400 <= encode(smollm2.tokenizer, sample, "multi_turn").needed_tokens(sample.turns) <= 400
        before, _, after = sample.context.partition(f"{turn.answer_prefix} {code}")
        assert after
        assert code not in before + after
        assert SUITE.score(sample, 0, f" {code}, and") == {"score": 1.0}
    assert len({sample.turns[0].answer_prefix for sample in samples}) > 10


def test_without_a_chat_template_a_code_is_what_is_hidden() -> None:
    request = make_request(tokenizer=byte_tokenizer(chat_template=None), haystack=NUMBERS, lengths=[300])
    assert {(s.task, s.chat) for s in SUITE.samples(request) if isinstance(s, Sample)} == {("code", False)}


def test_samples_are_the_same_again_and_other_with_another_seed(smollm2: LoadedModel) -> None:
    assert ask(smollm2, lengths=[300], num_samples=2) == ask(smollm2, lengths=[300], num_samples=2)
    assert ask(smollm2, lengths=[300], num_samples=2)[:10] == ask(smollm2, lengths=[300], num_samples=1)
    first, other = (ask(smollm2, lengths=[300], num_samples=1, seed=seed) for seed in (42, 43))
    assert first != other


def test_the_number_is_looked_for_in_normalized_text(smollm2: LoadedModel) -> None:
    sample = ask(smollm2, lengths=[300], num_samples=1)[0]
    (gold,) = sample.turns[0].answers
    assert SUITE.score(sample, 0, f" **{gold[:3]},{gold[3:]}**.") == {"score": 1.0}
    assert SUITE.score(sample, 0, f" {gold[:-1]}") == {"score": 0.0}


def test_requests_that_make_no_sense_are_refused(smollm2: LoadedModel) -> None:
    with pytest.raises(InputError, match="niah has no task 'needle'; choose from passkey, passkey_tokens"):
        ask(smollm2, tasks=["needle"])
    with pytest.raises(InputError, match="the haystack is empty"):
        ask(smollm2, haystack=" \n")
    with pytest.raises(InputError, match="length=50 is too short for passkey_tokens of niah; give at least 1"):
        ask(smollm2, lengths=[50])


def test_words_keep_their_white_space_and_begin_anew_where_the_text_ends() -> None:
    words = split_words(NUMBERS)
    assert "".join(words).rstrip() == NUMBERS
    assert "".join(take_words(words, 8, 4)).split() == ["nine", "ten", "one", "two"]
    assert list(islice((plant(words, "X", depth) for depth in (0, 0.15, 1)), 3)) == [
        f" X {NUMBERS}",
        f"one X {NUMBERS.removeprefix('one ')}",
        f"{NUMBERS} X ",
    ]


def test_sentences_end_where_a_reader_would_end_them() -> None:
    text = 'Mr. Darcy came. "Did he?" she asked.  J. Smith\nsaw 3.5 of them! Dr. May, e.g. the old one, did not.'
    assert split_sentences(text) == [
        "Mr. Darcy came.",
        '"Did he?" she asked.',
        "J. Smith\nsaw 3.5 of them!",
        "Dr. May, e.g. the old one, did not.",
    ]
