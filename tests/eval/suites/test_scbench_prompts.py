"""SCBench's prompts of both modes, to the letter."""

# ruff: noqa: RUF001

from pathlib import Path

import pytest

from eval_inputs import byte_tokenizer
from rocketkv.eval.data.samples import Sample
from rocketkv.eval.suites.scbench import TASKS
from scbench_rows import read_one

REPOQA_HEAD = (
    "Based on the function description and code context, please retrieve and repeat the exact described function "
    "from the code context in a code block wrapped by ```:\n\nCONTEXT"
)
THE_CORRECT = "The " + "the correct answer is"  # twice, as released


def written(sample: Sample) -> list[str]:
    """The first prompt whole, then what follows each answer."""
    first, *later = sample.turns
    return [sample.context + first.question, *(turn.question for turn in later)]


CHOICES = "\nA. w\nB. x\nC. y\nD. z\n\n"
KV_HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\nCONTEXT"
BOOK = "Read the book and answer the question."


# Task: the first prompt and what follows the later answers; in chat and, where it differs, without.
MULTI_TURN: dict[str, list[str]] = {
    "scbench_kv": [KV_HEAD + "\n\nONE", "TWO", "THREE"],
    "scbench_prefix_suffix": ["CONTEXT\n\nONE", "TWO", "THREE"],
    "scbench_vt": ["CONTEXT\n\nONE", "TWO"],
    "scbench_repoqa": [REPOQA_HEAD + "\n\nONE", "TWO"],
    "scbench_qa_eng": [
        BOOK + " Be very concise in your answer.\n\nCONTEXT\n\nQuestion: ONE\nAnswer:",
        "Question: TWO\nAnswer:",
        "Question: THREE\nAnswer:",
    ],
    "scbench_qa_chn": [
        "阅读以下书籍然后回答问题。\n\nCONTEXT\n\n问题：ONE\n答案：",
        "问题：TWO\n答案：",
        "问题：THREE\n答案：",
    ],
    "scbench_choice_eng": [
        BOOK + "\n\nCONTEXT\n\nQuestion: ONE" + CHOICES + THE_CORRECT,
        "Question: TWO" + CHOICES + THE_CORRECT,
    ],
    "scbench_many_shot": ["CONTEXT\n\nONE", "TWO"],
    "scbench_summary": ["CONTEXT\n\nONE", "TWO", "THREE"],
    "scbench_mf": [
        "What is the largest number?\n\n[1, 5, 9]\n\nThe largest number is",
        "What is the median?\n\nThe median is",
        "What is the smallest?\n\nThe smallest is",
    ],
    "scbench_summary_with_needles": ["CONTEXT\n\nONE", "TWO"],
    "scbench_repoqa_and_kv": ["CONTEXT\n\nONE", "TWO"],
}
MULTI_REQUEST = {
    "scbench_kv": (KV_HEAD, ["ONE", "TWO", "THREE"]),
    "scbench_prefix_suffix": ("CONTEXT", ["ONE", "TWO", "THREE"]),
    "scbench_vt": ("CONTEXT", ["ONE", "TWO"]),
    "scbench_repoqa": (REPOQA_HEAD, ["ONE", "TWO"]),
    "scbench_qa_eng": (
        BOOK + " Be very concise in your answer.\n\nCONTEXT",
        ["Question: ONE\nAnswer:", "Question: TWO\nAnswer:", "Question: THREE\nAnswer:"],
    ),
    "scbench_qa_chn": (
        "阅读以下书籍然后回答问题。\n\nCONTEXT",
        ["问题：ONE\n答案：", "问题：TWO\n答案：", "问题：THREE\n答案："],
    ),
    "scbench_choice_eng": (
        BOOK + "\n\nCONTEXT",
        ["Question: ONE" + CHOICES + THE_CORRECT, "Question: TWO" + CHOICES + THE_CORRECT],
    ),
    "scbench_many_shot": ("CONTEXT", ["ONE", "TWO"]),
    "scbench_summary": ("CONTEXT", ["ONE", "TWO", "THREE"]),
    "scbench_mf": (
        "The largest number is\n\n[1, 5, 9]",
        [
            "What is the largest number?\n\nThe largest number is",
            "What is the median?\n\nThe median is",
            "What is the smallest?\n\nThe smallest is",
        ],
    ),
    "scbench_summary_with_needles": ("CONTEXT", ["ONE", "TWO"]),
    "scbench_repoqa_and_kv": ("CONTEXT", ["ONE", "TWO"]),
}


@pytest.mark.parametrize("task", TASKS)
def test_multi_turn_prompts_are_the_official_ones_to_the_letter(task: str, tmp_path: Path) -> None:
    chat = read_one(tmp_path, task)
    assert chat.chat
    assert written(chat) == MULTI_TURN[task]
    plain = read_one(tmp_path, task, tokenizer=byte_tokenizer(chat_template=None))
    assert not plain.chat
    first, *later = MULTI_TURN[task]
    later = [text.replace(THE_CORRECT, "The letter of the correct answer is") for text in later]
    assert written(plain) == [first, *(f"\n\n{text}" for text in later)]


@pytest.mark.parametrize("task", TASKS)
def test_multi_request_prompts_are_the_official_ones_to_the_letter(task: str, tmp_path: Path) -> None:
    for template in ("x", None):
        sample = read_one(tmp_path, task, mode="multi_request", tokenizer=byte_tokenizer(template))
        context, questions = MULTI_REQUEST[task]
        assert sample.context == context
        assert [turn.question for turn in sample.turns] == questions
        assert not any(turn.answer_prefix for turn in sample.turns)


def test_later_summaries_are_begun_in_chat(tmp_path: Path) -> None:
    assert [turn.answer_prefix for turn in read_one(tmp_path, "scbench_summary").turns] == [
        "",
        "This paper",
        "This paper",
    ]
    plain = read_one(tmp_path, "scbench_summary", tokenizer=byte_tokenizer(None))
    assert not any(turn.answer_prefix for turn in plain.turns)
    assert not any(turn.answer_prefix for turn in read_one(tmp_path, "scbench_summary_with_needles").turns)


def test_parity_repeats_what_the_released_code_asks_for_in_chat(tmp_path: Path) -> None:
    sample = read_one(tmp_path, "scbench_mf", parity=True)
    assert written(sample) == [
        MULTI_TURN["scbench_mf"][0],
        "What is the smallest?\n\nThe median is",
        "What is the smallest?\n\nThe smallest is",
    ]
    plain = read_one(tmp_path, "scbench_mf", parity=True, tokenizer=byte_tokenizer(None))
    assert plain.turns[1].question == "\n\nWhat is the median?\n\nThe median is"
