"""SCBench's prompts, to the letter, misspellings included: `eval_utils.py` of microsoft/MInference (MIT).

The released code has four tables: two modes, with and without chat template. They differ in what stands between
context and questions, and in the few places that `write_prompt` names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rocketkv.eval.data.samples import BrokenRowError

# ruff: noqa: RUF001

CONTEXTS = {
    "scbench_kv": "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}",
    "scbench_choice_eng": "Read the book and answer the question.\n\n{context}",
    "scbench_qa_eng": "Read the book and answer the question. Be very concise in your answer.\n\n{context}",
    "scbench_qa_chn": "阅读以下书籍然后回答问题。\n\n{context}",
    "scbench_mf": "{prefix}\n\n{context}",
    "scbench_repoqa": (
        "Based on the function description and code context, please retrieve and repeat the exact described function "
        "from the code context in a code block wrapped by ```:\n\n{context}"
    ),
}
_OPTIONS = "Question: {input}\nA. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}\n\n"

QUESTIONS = {
    "scbench_choice_eng": _OPTIONS + "The the correct answer is",
    "scbench_qa_eng": "Question: {input}\nAnswer:",
    "scbench_qa_chn": "问题：{input}\n答案：",
}
CHOICE_AGAIN = _OPTIONS + "The letter of the correct answer is"


@dataclass(frozen=True)
class Prompt:
    """The text before the first question, and the questions."""

    context: str
    questions: Sequence[str]


def write_prompt(
    task: str, context: str, turns: Sequence[Mapping[str, Any]], *, multi_turn: bool, chat: bool, parity: bool
) -> Prompt:
    """Put a row into words.

    In multi-request mode nothing stands between context and question; in multi-turn mode a blank line does, and
    without chat template another one between an answer and the next question, which in multiple choice is then worded
    differently. "Math find" is preceded by what is asked for: in multi-turn mode once before the context and again
    before each later question, in multi-request mode before each question.

    Args:
        task: the name of one of the suite's tasks.
        context: the row's context.
        turns: the row's turns, with `input` and, for multiple choice, `options`.
        multi_turn: the mode.
        chat: whether the model has a chat template.
        parity: also repeat that the released code, in chat, names before each later question of "math find" what the
            last one asks for.

    Raises:
        BrokenRowError: a question of "math find" does not name what it asks for.
    """
    questions = []
    for number, turn in enumerate(turns):
        later = multi_turn and number > 0
        text = _question(task, turn, again=later and not chat)
        if task == "scbench_mf" and (later or not multi_turn):
            text = f"{_asked_for(turns[-1] if later and chat and parity else turn)}\n\n{text}"
        questions.append(f"\n\n{text}" if later and not chat else text)
    prefix = ""
    if task == "scbench_mf":
        prefix = _asked_for(turns[0]) if multi_turn else turns[0]["input"]
    head = CONTEXTS.get(task, "{context}").replace("{prefix}", prefix).replace("{context}", context)
    return Prompt(head + "\n\n" if multi_turn else head, questions)


def _question(task: str, turn: Mapping[str, Any], again: bool) -> str:
    template = QUESTIONS.get(task, "{input}")
    if task != "scbench_choice_eng":
        return template.replace("{input}", turn["input"])
    options = {f"OPTION_{letter}": option for letter, option in zip("ABCD", turn["options"], strict=True)}
    return (CHOICE_AGAIN if again else template).format(input=turn["input"], **options)


def _asked_for(turn: Mapping[str, Any]) -> str:
    """Return `What is the largest number?` for a question that says `The largest number is`."""
    match = re.search(r"The .+ is", turn["input"])
    if match is None:
        raise BrokenRowError(f"asks {turn['input'][:40]!r} where 'The ... is' is expected")
    return f"What is {match[0].lower()[:-3]}?"
