"""The official metrics of LongBench and SCBench, each from 0 to 1; tests compare them with written-out numbers.

Sources: `metrics.py` of THUDM/LongBench and `compute_scores.py` of SCBench (microsoft/MInference), both MIT.
"""

import difflib
import importlib
import importlib.util
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from rocketkv.errors import InputError

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"  # noqa: RUF001
    "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)


def require(*packages: str) -> None:
    """Check, before anything is generated, that the packages of a metric are installed.

    Raises:
        InputError: a package is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"a metric needs the package {package}; install it with `pip install rocketkv[eval]`.")


def library(package: str) -> Any:
    """Import a package of the extra `eval`, when a metric first needs the package.

    Raises:
        InputError: the package is missing.
    """
    require(package.partition(".")[0])
    return importlib.import_module(package)


def first_line(text: str) -> str:
    """Return the first line that is not empty, which LongBench scores in few-shot tasks."""
    return text.lstrip("\n").split("\n")[0]


def normalize_english(text: str) -> str:
    """Return a text in lower case, with single spaces, without ASCII punctuation and articles."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def normalize_chinese(text: str) -> str:
    """Return a text in lower case, without ASCII and Chinese punctuation and white space."""
    dropped = string.punctuation + CHINESE_PUNCTUATION
    return "".join("".join(char for char in text.lower() if char not in dropped).split())


def f1(prediction: Sequence[str], gold: Sequence[str]) -> float:
    """Return the F1 of two bags of tokens; 0 where they share no token."""
    shared = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * shared / (len(prediction) + len(gold)) if shared else 0.0


def qa_f1(prediction: str, gold: str) -> float:
    """Return the F1 of the words of an English answer."""
    return f1(normalize_english(prediction).split(), normalize_english(gold).split())


def qa_f1_chinese(prediction: str, gold: str) -> float:
    """Return the F1 of the words of a Chinese answer (LongBench)."""
    words = ([normalize_chinese(word) for word in _cut(text)] for text in (prediction, gold))
    return f1(*([word for word in some if word] for some in words))


def characters_f1(prediction: str, gold: str) -> float:
    """Return the F1 of the characters of a Chinese answer (SCBench)."""
    return f1(normalize_chinese(prediction), normalize_chinese(gold))


def rouge_l(prediction: str, gold: str) -> float:
    """Return ROUGE-L as the package `rouge` counts it: sentences end at a period, words at white space (LongBench)."""
    scorer = _rouge_l_scorer()
    with _deep_recursion(len(prediction) + len(gold)):
        try:
            return float(scorer.get_scores(prediction, gold)[0]["rouge-l"]["f"])
        except ValueError:  # one of the two texts has no sentence
            return 0.0


def rouge_l_chinese(prediction: str, gold: str) -> float:
    """Return the ROUGE-L of the words that jieba finds."""
    return rouge_l(" ".join(_cut(prediction)), " ".join(_cut(gold)))


def rouge_lsum(prediction: str, gold: str) -> float:
    """Return ROUGE-Lsum as `rouge-score` counts it, without stemming: sentences end at a newline (SCBench)."""
    return float(_rouge_lsum_scorer().score(gold, prediction)["rougeLsum"].fmeasure)


def classification(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """Return 1 over the number of class names in the prediction, if the gold one is among them, else 0.

    Names that are part of the gold one do not count.
    """
    found = [name for name in classes if name in prediction and not (name in gold and name != gold)]
    return 1 / len(found) if gold in found else 0.0


def count(prediction: str, gold: str) -> float:
    """Return the share of the numbers in the prediction that are the gold number."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(gold) / len(numbers) if numbers else 0.0


def paragraph_number(gold: str) -> str | None:
    """Return the number in a gold answer such as `Paragraph 12` or `段落12`."""
    match = re.search(r"(?:Paragraph |段落)(\d+)", gold)
    return match and match[1]


def retrieval(prediction: str, gold: str) -> float:
    """Return the share of the numbers in the prediction that are the gold paragraph's."""
    return count(prediction, paragraph_number(gold) or "")


def code_similarity(prediction: str, gold: str) -> float:
    """Return the similarity of the first line that is code to the gold line, in whole percent."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, gold).ratio()) / 100


def share_found(prediction: str, golds: Sequence[str]) -> float:
    """Return the share of the gold strings that occur in the prediction, in any case."""
    return sum(gold.lower() in prediction.lower() for gold in golds) / len(golds)


def any_found(prediction: str, golds: Sequence[str]) -> float:
    """Say whether one of the gold strings occurs in the prediction, in any case."""
    return float(any(gold.upper() in prediction.strip().upper() for gold in golds))


def first_integer(prediction: str, gold: str) -> float:
    """Say whether the first run of digits in the prediction is the gold one, to the digit."""
    match = re.search(r"[0-9]+", prediction)
    return float(match is not None and match[0] == gold)


def first_number(prediction: str, gold: str) -> float:
    """Say whether the first number in the prediction, as an integer if the gold one is an integer, is the gold one."""
    match = re.search(r"\d+\.\d+|\d+", prediction)
    if match is None:
        return 0.0
    number = float(match[0])
    return float(number == float(gold) if "." in gold else int(number) == int(gold))


def choice(prediction: str, text: str, letter: str) -> float:
    """Say whether the prediction chooses the option with this text and letter; the released rules, in their order."""
    labels = (text, letter)
    prediction = prediction.strip()
    if prediction[:1] in tuple("ABCD"):
        return float(prediction[0] in labels)
    if prediction in labels:
        return 1.0
    prediction = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", prediction))
    for phrase in ("answer is:", "answer:", "answer is", "option is"):
        _, found, rest = prediction.partition(phrase)
        if found:
            return float(rest[1:].startswith(labels))
    word = next((word for word in prediction.split() if word in "ABCD"), None)
    return float(word in labels)


def _cut(text: str) -> list[str]:
    """Return the words that jieba finds in a Chinese text."""
    jieba = library("jieba")
    jieba.setLogLevel("WARNING")  # jieba would report on standard error how it loads its dictionary
    return list(jieba.cut(text, cut_all=False))


@cache
def _rouge_l_scorer() -> Any:
    return library("rouge").Rouge(metrics=["rouge-l"])


@cache
def _rouge_lsum_scorer() -> Any:
    return library("rouge_score.rouge_scorer").RougeScorer(["rougeLsum"])


@contextmanager
def _deep_recursion(depth: int) -> Iterator[None]:
    """Let `rouge` recurse once per word; the official scorer counts 0 where the recursion limit is too low."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
