"""SCBench: 12 tasks of several questions about one context, asked in turn or each on its own.

Source: Li et al., "SCBench: A KV Cache-Centric Analysis of Long-Context Methods"; prompts, lengths and metrics as in
microsoft/MInference. `answers[0]` is what a later turn has as the answer before it, to the letter. Where the released
scorer goes through the characters of a string (`many_shot`, `qa_chn`), `released` is what it counts.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from rocketkv.errors import InputError
from rocketkv.eval.data.files import DataFile, by_stem, find_files
from rocketkv.eval.data.samples import BrokenRowError, Fault, Sample, Turn, make_samples, take, take_texts
from rocketkv.eval.metrics import official, repoqa
from rocketkv.eval.suites.base import Request
from rocketkv.eval.suites.scbench_prompts import write_prompt
from rocketkv.eval.suites.scbench_synthetic import MAKERS, make_row

LENGTHS = (4096, 8192, 16384)  # lengths of generated contexts in tokens, if the user gives none
NUM_SAMPLES = 100  # samples per task, as published


@dataclass(frozen=True)
class Task:
    """How one kind of question is scored.

    Attributes:
        score: the function that scores a prediction, given its turn and its sample.
        max_new_tokens: the largest number of tokens to generate.
        packages: the names of the packages that the metric needs.
    """

    score: Callable[[str, Turn, Sample], Mapping[str, float]]
    max_new_tokens: int
    packages: tuple[str, ...] = ()


def _gold_contained(prediction: str, turn: Turn, _: Sample) -> Mapping[str, float]:
    return {"score": float(turn.answers[0] in prediction)}


def _all_found(prediction: str, turn: Turn, _: Sample) -> Mapping[str, float]:
    return {"score": official.share_found(prediction, turn.answers[1:])}


def _gold_found(prediction: str, turn: Turn, _: Sample) -> Mapping[str, float]:
    return {"score": official.any_found(prediction, turn.answers)}


def _option_found(prediction: str, turn: Turn, _: Sample) -> Mapping[str, float]:
    (gold,) = turn.answers
    return {"score": official.any_found(prediction, [gold]), "released": official.any_found(prediction, list(gold))}


def _characters(prediction: str, turn: Turn, _: Sample) -> Mapping[str, float]:
    (gold,) = turn.answers
    released = max(official.characters_f1(prediction, char) for char in gold)
    return {"score": official.characters_f1(prediction, gold), "released": released}


def _choice(prediction: str, turn: Turn, _: Sample) -> Mapping[str, float]:
    text, letter = turn.answers
    return {"score": official.choice(prediction, text, letter)}


def _number(prediction: str, turn: Turn, _: Sample) -> Mapping[str, float]:
    return {"score": official.first_number(prediction, turn.answers[0])}


def _integer(prediction: str, turn: Turn, _: Sample) -> Mapping[str, float]:
    return {"score": official.first_integer(prediction, turn.answers[0])}


def _summary(prediction: str, turn: Turn, _: Sample) -> Mapping[str, float]:
    return {"score": official.rouge_lsum(prediction, turn.answers[0])}


def _function(prediction: str, turn: Turn, sample: Sample) -> Mapping[str, float]:
    return {"score": repoqa.repoqa(prediction, turn.answers, turn.options, sample.lang)}


_REPOQA = Task(_function, 1024, repoqa.PACKAGES)
_ROUGE = ("rouge_score",)

# The kinds of questions of each task, by the name that a turn of the data gives; the only kind of a task has no name.
TASKS: dict[str, dict[str, Task]] = {
    "scbench_kv": {"": Task(_gold_contained, 150)},
    "scbench_prefix_suffix": {"": Task(_gold_contained, 150)},
    "scbench_vt": {"": Task(_all_found, 30)},
    "scbench_repoqa": {"": _REPOQA},
    "scbench_qa_eng": {"": Task(_gold_found, 40)},
    "scbench_qa_chn": {"": Task(_characters, 40)},
    "scbench_choice_eng": {"": Task(_choice, 40)},
    "scbench_many_shot": {"": Task(_option_found, 10)},
    "scbench_summary": {"": Task(_summary, 200, _ROUGE)},
    "scbench_mf": {"": Task(_number, 5)},
    "scbench_summary_with_needles": {
        "scbench_summary": Task(_summary, 800, _ROUGE),
        "scbench_passkey": Task(_integer, 15),
    },
    "scbench_repoqa_and_kv": {"scbench_repoqa": _REPOQA, "scbench_kv": Task(_gold_contained, 80)},
}
MODES = ("multi_turn", "multi_request")

Functions = Mapping[str, Sequence[tuple[str, str]]]  # the names and texts of each repository's functions


class SCBench:
    """The suite; see `Suite`."""

    name = "scbench"
    tasks = tuple(TASKS)

    def samples(self, request: Request) -> Iterator[Sample | Fault]:
        """Return the asked tasks' rows, in the data's order, or generated ones; without tasks, all rows there are.

        Raises:
            InputError: an unknown task or mode, a task that needs data, data without it, or a package is missing.
        """
        if request.mode not in MODES:
            raise InputError(f"mode={request.mode!r} does not exist; choose from {', '.join(MODES)}.")
        for name in request.tasks:
            if name not in TASKS:
                raise InputError(f"scbench has no task {name!r}; choose from {', '.join(TASKS)}.")
        if request.data is None:
            names = request.tasks or tuple(MAKERS)
            if needy := [name for name in names if name not in MAKERS]:
                raise InputError(
                    f"{needy[0]} needs its data; give --data a folder with {needy[0]}.jsonl, of "
                    f"huggingface.co/datasets/microsoft/SCBench, or ask only for {', '.join(MAKERS)}."
                )
            return _generate(names, request)
        files = by_stem(find_files(request.data))
        names = request.tasks or tuple(name for name in TASKS if name in files)
        if not names or any(name not in files for name in names):
            missing = [f"{name}.jsonl" for name in names or TASKS if name not in files]
            raise InputError(f"{request.data} has no {' or '.join(missing)}; give data that has it, or other tasks.")
        official.require(*(package for name in names for kind in TASKS[name].values() for package in kind.packages))
        return _read({name: files[name] for name in names}, request)

    def score(self, sample: Sample, turn: int, prediction: str) -> Mapping[str, float]:
        """Score by the metric of the turn's kind, and add `released` where the released scorer counts otherwise."""
        asked = sample.turns[turn]
        return TASKS[sample.task][asked.subtask].score(prediction, asked, sample)


def _generate(names: Sequence[str], request: Request) -> Iterator[Sample | Fault]:
    for name in names:
        for length in request.lengths or LENGTHS:
            for number in range(NUM_SAMPLES if request.num_samples is None else request.num_samples):
                row = make_row(name, request.tokenizer, length, f"{request.seed} {name} {length} {number}")
                yield replace(_sample(name, request, {}, row, number), id=f"{length}-{number}", length=length)


def _read(files: Mapping[str, DataFile], request: Request) -> Iterator[Sample | Fault]:
    for name, file in files.items():
        functions = _functions(file) if _REPOQA in TASKS[name].values() else {}
        yield from make_samples(islice(file.items(), request.num_samples), partial(_sample, name, request, functions))


def _functions(file: DataFile) -> Functions:
    """Return the functions that all rows of a file ask for, by repository, among which an answer must be found."""
    functions: dict[str, list[tuple[str, str]]] = {}
    for item in file.items():
        row = item.value or {}
        for turn in row.get("multi_turns") or ():
            if isinstance(turn, dict) and isinstance(turn.get("name"), str) and isinstance(turn.get("answer"), str):
                functions.setdefault(str(row.get("repo")), []).append((turn["name"], turn["answer"]))
    return functions


def _sample(name: str, request: Request, functions: Functions, row: Mapping[str, Any], number: int) -> Sample:
    """Return a row of the official format; some tasks have their context under `input`, not `context`."""
    context = take(row, "context" if "context" in row else "input", list if name == "scbench_mf" else str)
    rows = take(row, "multi_turns", list)
    if not rows or not all(isinstance(turn, dict) for turn in rows):
        raise BrokenRowError("has 'multi_turns' that are no list of at least one object")
    turns = [_turn(name, turn, functions.get(str(row.get("repo")), ())) for turn in rows]
    chat, multi_turn = request.tokenizer.chat_template is not None, request.mode == "multi_turn"
    prompt = write_prompt(name, str(context), rows, multi_turn=multi_turn, chat=chat, parity=request.parity)
    prefix = "This paper" if name == "scbench_summary" and multi_turn and chat else ""  # from the second answer on
    lang = "zh" if name == "scbench_qa_chn" else take(row, "lang", str, "en")
    if _REPOQA in TASKS[name].values() and lang not in repoqa.GRAMMARS:
        raise BrokenRowError(f"has {lang!r} as 'lang' where one of {', '.join(repoqa.GRAMMARS)} is expected")
    return Sample(
        id=str(number),
        suite=SCBench.name,
        task=name,
        context=prompt.context,
        turns=tuple(
            replace(turn, question=question, answer_prefix=prefix if index else "")
            for index, (turn, question) in enumerate(zip(turns, prompt.questions, strict=True))
        ),
        chat=chat,
        lang=lang,
    )


def _turn(name: str, row: Mapping[str, Any], functions: Sequence[tuple[str, str]]) -> Turn:
    """Return a turn without its words, which `write_prompt` finds."""
    kinds = TASKS[name]
    subtask = "" if "" in kinds else take(row, "task", str)
    if subtask not in kinds:
        raise BrokenRowError(f"has {subtask!r} as a turn's 'task' where one of {', '.join(kinds)} is expected")
    kind = kinds[subtask]
    take(row, "input", str)
    options: tuple[str, ...] = ()
    if kind.score is _all_found:
        names = take_texts(row, "answer")
        answers = (str(list(names)), *names)
    else:
        answers = (str(take(row, "answer", (str, int, float))),)
        if not answers[0]:
            raise BrokenRowError("has an empty 'answer'")
    if kind.score is _choice:
        options = take_texts(row, "options", at_least=4)
        if len(options) != 4 or answers[0] not in options:
            raise BrokenRowError(f"has the answer {answers[0]!r}, which is none of its 4 options {options}")
        answers += ("ABCD"[options.index(answers[0])],)
    elif kind.score is _function:
        right = take(row, "name", str)
        options = tuple(dict.fromkeys(text for _, text in functions))
        answers = tuple(dict.fromkeys([answers[0], *(text for named, text in functions if named == right)]))
    elif kind.score is _number and not re.fullmatch(r"\d+(\.\d+)?", answers[0]):
        raise BrokenRowError(f"has {answers[0]!r} as 'answer' where a number is expected")
    return Turn("", answers, kind.max_new_tokens, options=options, subtask=subtask)


SUITE = SCBench()
