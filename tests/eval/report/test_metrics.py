"""Tests of the official metrics on examples whose numbers are computed by hand from the definitions."""

import math
import sys

import pytest

from rocketkv.errors import InputError
from rocketkv.eval.metrics import official as metrics
from rocketkv.eval.metrics import repoqa


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),  # case, article, punctuation
        ("in Paris, France", "Paris", 1 / 2),  # 1 shared of 3 and 1: 2 * 1 / 4
        ("a b c b", "b b b d", 4 / 7),  # the article goes: [b c b], [b b b d]; b twice: 2 * 2 / 7
        ("New-York", "new york", 0.0),  # punctuation goes without a space
        ("1,000", "1000", 1.0),
        ("“quoted”", "quoted", 0.0),  # only ASCII punctuation goes
        ("", "Paris", 0.0),
        ("the", "Paris", 0.0),
        ("the", "a", 0.0),  # nothing on either side
        ("theatre an-other", "theatre another", 1.0),  # articles are whole words, after punctuation
    ],
)
def test_qa_f1(prediction: str, gold: str, expected: float) -> None:
    assert metrics.qa_f1(prediction, gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("北京大学位于北京。", "北京大学", 1 / 2),  # words 北京大学, 位于, 北京; the full stop goes: 2 * 1 / (3 + 1)
        ("北京大学", "北京大学！", 1.0),  # noqa: RUF001
        ("北京", "北京大学", 0.0),  # other words, though characters are shared
        ("", "北京大学", 0.0),
        ("GPT", "gpt", 1.0),
    ],
)
def test_qa_f1_chinese(prediction: str, gold: str, expected: float) -> None:
    assert metrics.qa_f1_chinese(prediction, gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("北京", "北京大学", 2 / 3),  # 2 shared of 2 and 4
        ("北京 大学。", "北京大学", 1.0),
        ("", "北京大学", 0.0),
        ("A-b", "aB", 1.0),
    ],
)
def test_characters_f1(prediction: str, gold: str, expected: float) -> None:
    assert metrics.characters_f1(prediction, gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("the cat sat", "the cat sat on the mat", 3 / 4),  # 3 of 3 words; of 5 different ones: 2 * 3 / 8
        ("Cat", "cat", 0.0),  # case counts
        ("a b. c d", "c d. a b", 1.0),  # sentence by sentence
        ("a b c d", "c d a b", 1 / 2),  # one sentence: 2 in order of 4 and 4
        ("", "cat", 0.0),
        ("...", "cat", 0.0),
        ("cat", "", 0.0),
    ],
)
def test_rouge_l(prediction: str, gold: str, expected: float) -> None:
    assert metrics.rouge_l(prediction, gold) == pytest.approx(expected, abs=1e-6)


def test_rouge_l_of_one_long_sentence_does_not_run_out_of_recursion() -> None:
    words = [str(number) for number in range(700)]
    before = sys.getrecursionlimit()
    assert metrics.rouge_l(" ".join(words), " ".join(reversed(words))) == pytest.approx(1 / 700, abs=1e-6)
    assert sys.getrecursionlimit() == before


def test_rouge_l_chinese_counts_the_words_that_jieba_finds() -> None:
    assert metrics.rouge_l_chinese("北京大学很大", "北京大学") == pytest.approx(2 / 3, abs=1e-6)  # 北京大学, 很大
    assert metrics.rouge_l_chinese("", "北京大学") == 0.0


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("the cat", "the dog sat", 2 / 5),  # 1 in common of 2 and 3
        ("The cat sat.\nA dog ran.", "A dog ran.\nThe cat sat.", 1.0),  # lines are sentences; no case, no punctuation
        ("The cat sat. A dog ran.", "A dog ran. The cat sat.", 1 / 2),  # one line: 3 in order of 6 and 6
        ("running", "run", 0.0),  # no stemming
        ("", "cat", 0.0),
    ],
)
def test_rouge_lsum(prediction: str, gold: str, expected: float) -> None:
    assert metrics.rouge_lsum(prediction, gold) == pytest.approx(expected)


CLASSES = ["Color", "Food", "Other entity", "Group of person", "person", "Letter"]


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("Type: Food", "Food", 1.0),
        ("Food or Color", "Food", 1 / 2),
        ("Group of person", "Group of person", 1.0),  # `person` is part of the gold name
        ("Group of person", "person", 1 / 2),  # the other way round it counts
        ("food", "Food", 0.0),  # case counts
        ("Color", "Food", 0.0),
        ("", "Food", 0.0),
    ],
)
def test_classification(prediction: str, gold: str, expected: float) -> None:
    assert metrics.classification(prediction, gold, CLASSES) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [("7", "7", 1.0), ("7 of 17, or 7", "7", 2 / 3), ("07", "7", 0.0), ("seven", "7", 0.0), ("", "7", 0.0)],
)
def test_count(prediction: str, gold: str, expected: float) -> None:
    assert metrics.count(prediction, gold) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("Paragraph 15", "Paragraph 15", 1.0),
        ("15 and 3", "Paragraph 15", 1 / 2),
        ("段落3", "段落3", 1.0),
        ("none", "Paragraph 15", 0.0),
    ],
)
def test_retrieval(prediction: str, gold: str, expected: float) -> None:
    assert metrics.retrieval(prediction, gold) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("\n\nreturn x\nmore", "return x", 1.0),
        ("```python\n# comment\n// too\nreturn x", "return x", 1.0),
        ("return y", "return x", 0.88),  # 2 * 7 / 16 = 0.875, rounded half to even in percent: 87.5 -> 88
        ("abcd", "bcde", 0.75),  # 2 * 3 / 8
        ("abc", "abcde", 0.75),  # 2 * 3 / 8
        ("ab", "abc", 0.8),  # 2 * 2 / 5
        ("a", "xyz", 0.0),
        ("", "x", 0.0),
        ("`x`", "x", 0.0),  # no line that is code
    ],
)
def test_code_similarity(prediction: str, gold: str, expected: float) -> None:
    assert metrics.code_similarity(prediction, gold) == expected


def test_first_line() -> None:
    assert metrics.first_line("\n\nFood\nType: Color") == "Food"
    assert metrics.first_line(" \nFood") == " "  # only line breaks are passed over
    assert metrics.first_line("") == ""


def test_strings_found_in_any_case() -> None:
    assert metrics.share_found("vars abc and DEF", ["ABC", "def", "GHI"]) == pytest.approx(2 / 3)
    assert metrics.share_found("", ["ABC"]) == 0.0
    assert metrics.any_found("It was paris.", ["London", "Paris"]) == 1.0
    assert metrics.any_found("", ["Paris"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "gold", "integer", "number"),
    [
        ("It is 12345.", "12345", 1.0, 1.0),
        ("12,345", "12", 1.0, 1.0),
        ("7 or 12", "12", 0.0, 0.0),
        ("12.9", "12", 1.0, 1.0),
        ("012", "12", 0.0, 1.0),  # to the digit, or by value
        ("-12", "12", 1.0, 1.0),
        ("2.5", "2.5", 0.0, 1.0),
        ("none", "12", 0.0, 0.0),
        ("", "12", 0.0, 0.0),
    ],
)
def test_first_integer_and_first_number(prediction: str, gold: str, integer: float, number: float) -> None:
    assert metrics.first_integer(prediction, gold) == integer
    assert metrics.first_number(prediction, gold) == number


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B", 1.0),
        (" B. Peter", 1.0),
        ("C", 0.0),
        ("Because", 1.0),  # the first letter decides, whatever word it starts
        ("Peter", 1.0),
        ("The answer is: B", 1.0),
        ("the answer is Peter", 1.0),
        ("I say the answer is (B)", 0.0),  # what follows must start with it
        ("the answer is", 0.0),
        ("it must be B", 1.0),  # the first word of A, B, C, D
        ("it must be D or B", 0.0),
        ("the option is 'B'", 1.0),  # quotes become spaces, and spaces one
        ("nothing", 0.0),
        ("", 0.0),
    ],
)
def test_choice(prediction: str, expected: float) -> None:
    assert metrics.choice(prediction, "Peter", "B") == expected


@pytest.mark.parametrize(
    ("language", "code", "function"),
    [
        ("python", "import os\n\ndef f(a):\n    return a\n\nx = 1", "def f(a):\n    return a"),
        ("java", "class A { int f(int a) { return a; } }", "int f(int a) { return a; }"),
        ("typescript", "const y = 1;\nfunction f(a: number) { return a }", "function f(a: number) { return a }"),
        ("rust", "// é\nfn f(a: i32) -> i32 { a }\nfn g() {}", "fn f(a: i32) -> i32 { a }"),
        ("cpp", "#include <x>\nint f(int a) { return a; }", "int f(int a) { return a; }"),
        ("go", "package p\n\nfunc f(a int) int { return a }", "func f(a int) int { return a }"),
    ],
)
def test_the_function_is_taken_out_of_the_answer(language: str, code: str, function: str) -> None:
    assert repoqa.extract_function(f"Here it is:\n```{language}\n{code}\n```\nDone.", language) == function
    assert repoqa.extract_function(f" {code} \n", language) == code.strip()  # no block: all of it
    assert repoqa.extract_function("```\nno function\n```\n```\nnor here\n```", language) == "no function\n"


def test_function_similarity_is_smoothed_bleu() -> None:
    # 1- to 4-grams in common: 5 of 6, 3 of 5, 2 of 4, 1 of 3
    expected = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert repoqa.similarity("the cat sat on the mat", "the cat sat on a mat") == pytest.approx(expected)
    assert repoqa.similarity("a b\n  c d", "a b c d") == pytest.approx(1.0)  # white space is all one
    assert repoqa.similarity("", "a b c d") == 0.0
    # no 4-gram in common of 1, the first such length of n-grams: counted as ln(4 words) / (2 * 5)
    smoothed = (3 / 4 * 2 / 3 * 1 / 2 * math.log(4) / 10) ** (1 / 4)
    assert repoqa.similarity("a b c x", "a b c d") == pytest.approx(smoothed)


def test_repoqa_wants_the_right_function_and_it_well() -> None:
    first = "def first(a, b):\n    total = a + b\n    return total * 2"
    second = "def second(x):\n    for y in x:\n        print(y)\n    return None"
    assert repoqa.repoqa(f"```python\n{first}\n```", [first], [first, second], "python") == 1.0
    assert repoqa.repoqa(f"```python\n{second}\n```", [first], [first, second], "python") == 0.0
    assert (
        repoqa.repoqa("def first(a, b):\n    pass", [first], [first, second], "python") == 0.0
    )  # the right one, poorly
    assert repoqa.repoqa("", [first], [first, second], "python") == 0.0


def test_a_missing_package_is_named_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"no_such_package; install it with `pip install rocketkv\[eval\]`"):
        metrics.require("rouge", "no_such_package")
