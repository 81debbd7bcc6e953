"""LongBench v1: 21 sets of real texts, of which the 16 English ones are the default.

Source: Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding"; prompts, lengths,
chat template or not, and metrics as in THUDM/LongBench. Cutting a prompt's middle out where it is too long is the
runner's business.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from rocketkv.errors import InputError
from rocketkv.eval.data.files import DataFile, by_stem, find_files
from rocketkv.eval.data.samples import BrokenRowError, Fault, Sample, Turn, make_samples, take, take_texts
from rocketkv.eval.metrics import official
from rocketkv.eval.suites.base import Request
from rocketkv.eval.suites.longbench_prompts import PROMPTS


@dataclass(frozen=True)
class Task:
    """Describes how a set is asked and scored.

    Attributes:
        metric: a function of prediction, answer and class names; the best answer counts.
        max_new_tokens: the largest number of tokens to generate.
        chat: whether the prompt goes through the chat template; few-shot prompts and code do not.
        first_line: whether only the prediction's first line counts.
        packages: the names of the packages that the metric needs.
    """

    metric: Callable[..., float]
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False
    packages: tuple[str, ...] = ()


_ROUGE, _JIEBA = ("rouge",), ("jieba",)

TASKS = {
    "narrativeqa": Task(official.qa_f1, 128),
    "qasper": Task(official.qa_f1, 128),
    "multifieldqa_en": Task(official.qa_f1, 64),
    "multifieldqa_zh": Task(official.qa_f1_chinese, 64, packages=_JIEBA),
    "hotpotqa": Task(official.qa_f1, 32),
    "2wikimqa": Task(official.qa_f1, 32),
    "musique": Task(official.qa_f1, 32),
    "dureader": Task(official.rouge_l_chinese, 128, packages=_ROUGE + _JIEBA),
    "gov_report": Task(official.rouge_l, 512, packages=_ROUGE),
    "qmsum": Task(official.rouge_l, 512, packages=_ROUGE),
    "multi_news": Task(official.rouge_l, 512, packages=_ROUGE),
    "vcsum": Task(official.rouge_l_chinese, 512, packages=_ROUGE + _JIEBA),
    "trec": Task(official.classification, 64, chat=False, first_line=True),
    "triviaqa": Task(official.qa_f1, 32, chat=False, first_line=True),
    "samsum": Task(official.rouge_l, 128, chat=False, first_line=True, packages=_ROUGE),
    "lsht": Task(official.classification, 64, chat=False, first_line=True),
    "passage_count": Task(official.count, 32),
    "passage_retrieval_en": Task(official.retrieval, 32),
    "passage_retrieval_zh": Task(official.retrieval, 32),
    "lcc": Task(official.code_similarity, 64, chat=False),
    "repobench-p": Task(official.code_similarity, 64, chat=False),
}
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
ENGLISH = tuple(name for name in TASKS if name not in CHINESE)


class LongBench:
    """The suite; see `Suite`."""

    name = "longbench"
    tasks = tuple(TASKS)

    def samples(self, request: Request) -> Iterator[Sample | Fault]:
        """Return the rows of the asked tasks, in the data's order; without tasks, of the English ones in the data.

        Raises:
            InputError: an unknown task, no data, data without one of the tasks, or a package is missing.
        """
        if request.data is None:
            raise InputError(
                "longbench needs its data; give --data the folder or the data.zip of "
                "huggingface.co/datasets/THUDM/LongBench, or a file of it."
            )
        files = by_stem(find_files(request.data))
        for name in request.tasks:
            if name not in TASKS:
                raise InputError(f"longbench has no task {name!r}; choose from {', '.join(TASKS)}.")
            if name not in files:
                raise InputError(f"{request.data} has no {name}.jsonl; give data that has it, or other tasks.")
        names = request.tasks or [name for name in ENGLISH if name in files]
        if not names:
            raise InputError(f"{request.data} has none of the files {', '.join(f'{name}.jsonl' for name in ENGLISH)}.")
        official.require(*(package for name in names for package in TASKS[name].packages))
        return self._read({name: files[name] for name in names}, request.num_samples)

    def score(self, sample: Sample, turn: int, prediction: str) -> Mapping[str, float]:
        """Score an answer by the task's metric against the best gold answer."""
        task = TASKS[sample.task]
        text = official.first_line(prediction) if task.first_line else prediction
        more = [sample.all_classes] if task.metric is official.classification else []
        return {"score": max(task.metric(text, answer, *more) for answer in sample.turns[turn].answers)}

    def _read(self, files: Mapping[str, DataFile], num_samples: int | None) -> Iterator[Sample | Fault]:
        for name, file in files.items():
            yield from make_samples(islice(file.items(), num_samples), partial(_sample, name))


def _sample(name: str, row: Mapping[str, Any], number: int) -> Sample:
    """Return the sample of a row in the official format; its question starts where the prompt first depends on it."""
    task = TASKS[name]
    answers = take_texts(row, "answers")
    classified = task.metric is official.classification
    if task.metric is official.retrieval and not all(official.paragraph_number(answer) for answer in answers):
        raise BrokenRowError(f"has {answers[0]!r} as an answer where 'Paragraph' or '段落' and a number is expected")
    head, question, tail = PROMPTS[name].partition("{input}")
    if not question:
        head, question, tail = PROMPTS[name].partition("{context}")
        head, question = head + question, ""
    return Sample(
        id=take(row, "_id", str, str(number)),
        suite=LongBench.name,
        task=name,
        context=head.replace("{context}", take(row, "context", str)),
        turns=(Turn((take(row, "input", str) if question else "") + tail, answers, task.max_new_tokens),),
        chat=task.chat,
        all_classes=take_texts(row, "all_classes") if classified else (),
        lang=take(row, "language", str, "en"),
    )


SUITE = LongBench()
