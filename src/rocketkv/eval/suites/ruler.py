"""RULER: thirteen synthetic tasks at any length; the prompt and what may be generated fill the length.

For parity the prose starts where the haystack does, questions come in the order of their file, 50 samples are made (as
for RocketKV) and the answer's first words keep their outer spaces; else the prose starts anywhere, questions are
shuffled and there are 500 samples. A model without a chat template gets the question and, on a new line, the answer's
first words, as a text to complete.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

from rocketkv.errors import InputError
from rocketkv.eval.data.documents import Case, read_hotpotqa, read_squad
from rocketkv.eval.data.haystack import fill, split_words
from rocketkv.eval.data.samples import Fault, Sample, Turn
from rocketkv.eval.metrics.official import any_found, share_found
from rocketkv.eval.suites.base import Request
from rocketkv.eval.suites.ruler_needles import Needles
from rocketkv.eval.suites.ruler_tasks import (
    CommonWords,
    DocumentsQuestion,
    FrequentWords,
    Material,
    Task,
    VariableTracking,
    all_words,
)

TASKS: dict[str, tuple[Task, int]] = {  # and the number of tokens to generate
    "niah_single_1": (Needles("noise"), 128),
    "niah_single_2": (Needles("essay"), 128),
    "niah_single_3": (Needles("essay", values="uuids"), 128),
    "niah_multikey_1": (Needles("essay", num_keys=4), 128),
    "niah_multikey_2": (Needles("needles"), 128),
    "niah_multikey_3": (Needles("needles", keys="uuids", values="uuids"), 128),
    "niah_multivalue": (Needles("essay", num_values=4), 128),
    "niah_multiquery": (Needles("essay", num_keys=4, num_queries=4), 128),
    "vt": (VariableTracking(), 30),
    "cwe": (CommonWords(), 120),
    "fwe": (FrequentWords(), 50),
    "qa_1": (DocumentsQuestion(), 32),
    "qa_2": (DocumentsQuestion(), 32),
}
DOCUMENTS = {"qa_1": "SQuAD v2", "qa_2": "HotpotQA"}
LENGTHS = (4096,)


class Ruler:
    """The suite; see `Suite`."""

    name = "ruler"
    tasks = tuple(TASKS)

    def samples(self, request: Request) -> Iterator[Sample | Fault]:
        """Return `num_samples` (500) samples of each task at each length; without tasks, of all whose data is there.

        Raises:
            InputError: an unknown task, data that is missing, an empty haystack, the package wonderwords is missing or,
                while iterating, a length with no room for any of it.
        """
        for task in request.tasks:
            if task not in TASKS:
                raise InputError(f"ruler has no task {task!r}; choose from {', '.join(TASKS)}.")
        cases = {task: _cases(task, request) for task in DOCUMENTS if task in (request.tasks or TASKS)}
        names = request.tasks or [task for task in TASKS if cases.get(task, True)]
        for task in names:
            if task in DOCUMENTS and not cases[task]:
                raise InputError(f"ruler's {task} needs a {DOCUMENTS[task]} file (.json, .json.gz); give it as --data.")
        all_words()  # this finds a missing package at once, not after hours
        return self._make(request, names, cases, split_words(" ".join(request.haystack.split())))

    def score(self, sample: Sample, turn: int, prediction: str) -> Mapping[str, float]:
        """Return the share of the answers that are found; for questions over documents, whether any is."""
        metric = any_found if sample.task in DOCUMENTS else share_found
        return {"score": metric(prediction, sample.turns[turn].answers)}

    def _make(
        self, request: Request, names: Sequence[str], cases: Mapping[str, Sequence[Case]], words: Sequence[str]
    ) -> Iterator[Sample]:
        num_samples = request.num_samples or (50 if request.parity else 500)
        start = 0 if request.parity else None
        for name, length in product(names, request.lengths or LENGTHS):
            asked = cases.get(name, ())
            pool = sorted({document for case in asked for document in case.documents + case.related})
            for index in range(min(num_samples, len(asked) or num_samples)):
                case = asked[index] if asked else None
                yield _sample(name, index, request, Material(words, start, length, case, pool))


def _sample(name: str, index: int, request: Request, material: Material) -> Sample:
    """Return the largest case of a task that fits in the length."""
    task, new_tokens = TASKS[name]

    def make(size: int) -> Sample:
        draft = task.draw(random.Random(request.seed + index), size, material)
        prefix = draft.answer_prefix if request.parity else draft.answer_prefix.strip()
        is_chat = request.tokenizer.chat_template is not None
        question = draft.question if is_chat or request.parity else f"{draft.question}\n"
        turn = Turn(question, draft.answers, new_tokens, prefix)
        id, length = f"{material.length}-{index}", material.length
        return Sample(id, Ruler.name, name, draft.context, (turn,), is_chat, length=length, depth=draft.depth)

    largest = len(all_words()) if isinstance(task, CommonWords) else material.length
    return fill(make, request.tokenizer, task.smallest, largest, material.length)


def _cases(task: str, request: Request) -> list[Case]:
    """Return the questions of a task over documents; none without the data."""
    if request.data is None:
        return []
    cases = _squad_cases(request.data) if task == "qa_1" else read_hotpotqa(request.data)
    if not request.parity:
        random.Random(request.seed).shuffle(cases)
    return cases


def _squad_cases(data: Path) -> list[Case]:
    """Return each question with its paragraph and, as related ones, the others of its article."""
    return [
        Case(question, (paragraph.text,), tuple(other.text for other in article if other is not paragraph))
        for article in read_squad(data)
        for paragraph in article
        for question in paragraph.questions
    ]


SUITE = Ruler()
