"""LongBench: prompts to the letter, lengths, post-processing and the data's ways of coming."""

# ruff: noqa: E501, RUF001

import gzip
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from eval_inputs import make_request, write_lines
from rocketkv.errors import InputError
from rocketkv.eval.data.samples import Fault, Sample
from rocketkv.eval.suites.longbench import ENGLISH, SUITE, TASKS

# Whole prompts for the context CONTEXT and the input INPUT, written out from the official configuration.
PROMPTS = {
    "narrativeqa": "You are given a story, which can be either a novel or a movie script, and a question. Answer the question asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: CONTEXT\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nQuestion: INPUT\n\nAnswer:",
    "qasper": 'You are given a scientific article and a question. Answer the question as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\nArticle: CONTEXT\n\n Answer the question based on the above article as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\nQuestion: INPUT\n\nAnswer:',
    "multifieldqa_en": "Read the following text and answer briefly.\n\nCONTEXT\n\nNow, answer the following question based on the above text, only give me the answer and do not output any other words.\n\nQuestion: INPUT\nAnswer:",
    "multifieldqa_zh": "阅读以下文字并用中文简短回答：\n\nCONTEXT\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：INPUT\n回答：",
    "hotpotqa": "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\nCONTEXT\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: INPUT\nAnswer:",
    "2wikimqa": "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\nCONTEXT\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: INPUT\nAnswer:",
    "musique": "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\nCONTEXT\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: INPUT\nAnswer:",
    "dureader": "请基于给定的文章回答下述问题。\n\n文章：CONTEXT\n\n请基于上述文章回答下面的问题。\n\n问题：INPUT\n回答：",
    "gov_report": "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\nCONTEXT\n\nNow, write a one-page summary of the report.\n\nSummary:",
    "qmsum": "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or more sentences.\n\nTranscript:\nCONTEXT\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: INPUT\nAnswer:",
    "multi_news": "You are given several news passages. Write a one-page summary of all news. \n\nNews:\nCONTEXT\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    "vcsum": "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\nCONTEXT\n\n会议总结：",
    "trec": "Please determine the type of the question below. Here are some examples of questions.\n\nCONTEXT\nINPUT",
    "triviaqa": "Answer the question based on the given passage. Only give me the answer and do not output any other words. The following are some examples.\n\nCONTEXT\n\nINPUT",
    "samsum": "Summarize the dialogue into a few short sentences. The following are some examples.\n\nCONTEXT\n\nINPUT",
    "lsht": "请判断给定新闻的类别，下面是一些例子。\n\nCONTEXT\nINPUT",
    "passage_count": "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, how many non-repeating paragraphs are there in total?\n\nCONTEXT\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
    "passage_retrieval_en": 'Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is from.\n\nCONTEXT\n\nThe following is an abstract.\n\nINPUT\n\nPlease enter the number of the paragraph that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
    "passage_retrieval_zh": '以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\nCONTEXT\n\n下面是一个摘要\n\nINPUT\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
    "lcc": "Please complete the code given below. \nCONTEXTNext line of code:\n",
    "repobench-p": "Please complete the code given below. \nCONTEXTINPUTNext line of code:\n",
}
WITHOUT_INPUT = ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
ANSWERS = {"passage_retrieval_en": "Paragraph 3", "passage_retrieval_zh": "段落3", "passage_count": "3"}


def make_row(task: str, **changes: Any) -> dict[str, Any]:
    """Return a row of the official format."""
    row = {
        "input": "INPUT",
        "context": "CONTEXT",
        "answers": [ANSWERS.get(task, "Food")],
        "length": 5,
        "dataset": task,
        "language": "en",
        "all_classes": ["Food", "Color"] if task in ("trec", "lsht") else None,
        "_id": f"{task}-0",
    }
    return row | changes


def read(path: Path, **changes: Any) -> list[Sample | Fault]:
    return list(SUITE.samples(make_request(data=path, **changes)))


def read_one(folder: Path, task: str, **changes: Any) -> Sample:
    path = write_lines(folder / f"{task}.jsonl", [make_row(task, **changes)])
    (sample,) = read(path, tasks=(task,))
    assert isinstance(sample, Sample)
    return sample


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_the_official_ones_to_the_letter(task: str, tmp_path: Path) -> None:
    sample = read_one(tmp_path, task)
    (turn,) = sample.turns
    assert sample.context + turn.question == PROMPTS[task]
    # what does not depend on the question stands in the context: it ends where the input, or else what follows, starts
    assert sample.context.endswith("CONTEXT" if task in WITHOUT_INPUT else PROMPTS[task].partition("INPUT")[0])
    assert turn.question.startswith("" if task in WITHOUT_INPUT else "INPUT")
    assert turn.answer_prefix == ""


def test_braces_in_the_text_stay(tmp_path: Path) -> None:
    sample = read_one(tmp_path, "hotpotqa", context="{input} {0}", input="{context}?")
    assert "passages.\n{input} {0}\n\n" in sample.context
    assert sample.turns[0].question == "{context}?\nAnswer:"


def test_lengths_of_answers_and_chat_template() -> None:
    by_length = {
        number: {name for name in TASKS if TASKS[name].max_new_tokens == number} for number in (32, 64, 128, 512)
    }
    assert by_length == {
        32: {
            "hotpotqa",
            "2wikimqa",
            "musique",
            "triviaqa",
            "passage_count",
            "passage_retrieval_en",
            "passage_retrieval_zh",
        },
        64: {"multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"},
        128: {"narrativeqa", "qasper", "dureader", "samsum"},
        512: {"gov_report", "qmsum", "multi_news", "vcsum"},
    }
    assert {name for name in TASKS if not TASKS[name].chat} == {
        "trec",
        "triviaqa",
        "samsum",
        "lsht",
        "lcc",
        "repobench-p",
    }
    assert {name for name in TASKS if TASKS[name].first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    assert len(TASKS) == 21
    assert len(ENGLISH) == 16


@pytest.mark.parametrize(
    ("task", "answers", "prediction", "expected"),
    [
        ("qasper", ["Paris", "the big city"], "Big city!", 1.0),  # the best answer counts
        ("triviaqa", ["Paris"], "\nParis\nPassage: London", 1.0),  # only the first line
        ("hotpotqa", ["Paris"], "Paris\nLondon", 2 / 3),  # all lines
        ("trec", ["Food"], "Food\nType: Color", 1.0),
        ("trec", ["Food"], "Food, Color", 1 / 2),
        ("samsum", ["a b c d"], "a b\nc d", 2 / 3),
        ("gov_report", ["a b c d"], "a b\nc d", 1.0),
        ("passage_count", ["3"], "3, not 4", 1 / 2),
        ("passage_retrieval_en", ["Paragraph 3"], "Paragraph 3", 1.0),
        ("passage_retrieval_zh", ["段落3"], "段落3", 1.0),
        ("lcc", ["return x"], "# so\nreturn x\n", 1.0),
        ("multifieldqa_zh", ["北京大学"], "北京大学。", 1.0),
        ("vcsum", ["北京大学"], "北京大学很大", 2 / 3),
        ("narrativeqa", ["Paris"], "", 0.0),
    ],
)
def test_scores(task: str, answers: list[str], prediction: str, expected: float, tmp_path: Path) -> None:
    sample = read_one(tmp_path, task, answers=answers)
    assert SUITE.score(sample, 0, prediction) == {"score": pytest.approx(expected, abs=1e-6)}


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_scores_one(task: str, tmp_path: Path) -> None:
    sample = read_one(tmp_path, task)
    assert SUITE.score(sample, 0, sample.turns[0].answers[0])["score"] == pytest.approx(1.0, abs=1e-6)


def test_the_english_sets_that_are_there_are_the_default(tmp_path: Path) -> None:
    for task in ("qasper", "lcc", "vcsum"):
        write_lines(tmp_path / f"{task}.jsonl", [make_row(task)])
    write_lines(tmp_path / "qasper_e.jsonl", ["not read"])
    assert [sample.task for sample in read(tmp_path) if isinstance(sample, Sample)] == ["qasper", "lcc"]
    assert [sample.task for sample in read(tmp_path, tasks=("vcsum",)) if isinstance(sample, Sample)] == ["vcsum"]


def test_data_comes_as_zip_folder_or_packed_file(tmp_path: Path) -> None:
    rows = [make_row("qasper", _id=str(number)) for number in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "qasper.jsonl", rows)
    (packed := tmp_path / "qasper.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", text)
        archive.writestr("__MACOSX/data/._qasper.jsonl", "x")
    expected = read(folder)
    assert [sample.id for sample in expected if isinstance(sample, Sample)] == ["0", "1", "2"]
    assert read(packed) == expected
    assert read(tmp_path / "data.zip") == expected
    assert read(folder, num_samples=2) == expected[:2]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"input": ', "is no JSON"),
        ("[1]", "is list where an object is expected"),
        ({"context": None}, "has NoneType as 'context' where str is expected"),
        ({"answers": []}, r"has \[\] as 'answers' where at least 1 strings are expected"),
        ({"answers": [3]}, r"has \[3\] as 'answers'"),
        ({"_id": "first"}, "has the id 'first' of an earlier row"),
        ({"all_classes": None}, "has NoneType as 'all_classes'"),
    ],
)
def test_a_broken_row_is_named_and_the_others_are_read(broken: Any, reason: str, tmp_path: Path) -> None:
    row = broken if isinstance(broken, str) else make_row("trec", **broken)
    rows = [make_row("trec", _id="first"), row, make_row("trec", _id="last")]
    first, fault, last = read(write_lines(tmp_path / "trec.jsonl", rows))
    assert isinstance(first, Sample)
    assert isinstance(fault, Fault)
    assert fault.source == "trec.jsonl, line 2"
    assert re.match(reason, fault.reason)
    assert isinstance(last, Sample)


def test_a_paragraph_without_a_number_is_a_broken_row(tmp_path: Path) -> None:
    (fault,) = read(
        write_lines(tmp_path / "passage_retrieval_en.jsonl", [make_row("passage_retrieval_en", answers=["3"])])
    )
    assert isinstance(fault, Fault)
    assert "has '3' as an answer where 'Paragraph'" in fault.reason


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    write_lines(tmp_path / "qasper.jsonl", [make_row("qasper")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.zip").write_text("no")
    write_lines(tmp_path / "other.jsonl", [])
    for changes, message in [
        ({"data": None}, "longbench needs its data; give --data"),
        ({"tasks": ("qasper", "quality")}, "longbench has no task 'quality'; choose from narrativeqa"),
        ({"tasks": ("trec",)}, "has no trec.jsonl; give data that has it"),
        ({"data": tmp_path / "absent"}, "absent does not exist"),
        ({"data": tmp_path / "empty"}, "is or holds no .jsonl"),
        ({"data": tmp_path / "no.zip"}, "is no .zip file"),
        ({"data": tmp_path / "other.jsonl"}, "has none of the files narrativeqa.jsonl"),
    ]:
        with pytest.raises(InputError, match=message):
            SUITE.samples(make_request(**{"data": tmp_path} | changes))
