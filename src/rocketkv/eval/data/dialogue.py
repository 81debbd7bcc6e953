"""Turns a sample into tokens: the context, the questions, and between the questions the right answers.

Pieces are encoded one by one, as the turns of a conversation are, so that a turn never changes the tokens before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rocketkv.errors import InputError
from rocketkv.eval.data.samples import Sample, Turn
from rocketkv.hf.text import PlainText

MODES = ("multi_turn", "multi_request")


@dataclass(frozen=True)
class Dialogue:
    """A sample in tokens.

    Attributes:
        head: the tokens of the context, prefilled before any question; empty where each piece follows the one before.
        pieces: the tokens that each turn adds to `head`, or to all pieces and right answers before it.
    """

    head: list[int]
    pieces: list[list[int]]

    def prompt_tokens(self, turn: int) -> int:
        """Return the number of tokens that the model has seen when it answers turn `turn`."""
        if self.head:
            return len(self.head) + len(self.pieces[turn])
        return sum(map(len, self.pieces[: turn + 1]))

    def needed_tokens(self, turns: Sequence[Turn]) -> int:
        """Return the number of tokens that the longest prompt takes with its answer."""
        return max(self.prompt_tokens(k) + turn.max_new_tokens for k, turn in enumerate(turns))


def encode(tokenizer: PreTrainedTokenizerBase, sample: Sample, mode: str) -> Dialogue:
    """Render a sample and encode what each turn adds; its own text is text, special tokens written out in it too.

    Args:
        tokenizer: the model's tokenizer; its chat template is used where the sample is a chat and there is one.
        sample: the sample to ask.
        mode: `multi_turn`: a question follows the right answer to the last one; `multi_request`: each follows the
            context, which stands first on its own.

    Raises:
        InputError: the chat template refuses the sample, changes its text, or rewrites earlier turns.
    """
    plain = PlainText(tokenizer)
    sample = _hide(plain, sample)
    texts = [_render(tokenizer, sample, turn, mode) for turn in range(len(sample.turns))]
    if mode == "multi_request":
        head = texts[0][: texts[0].find(sample.context) + len(sample.context)]
        starts = [head] * len(texts)
        if not sample.context.strip() or not head.endswith(sample.context):
            raise InputError("the prompt does not begin with its context, which multi_request takes in by itself.")
    else:
        head, starts = "", ["", *texts[:-1]]
    if not all(text.startswith(start) for text, start in zip(texts, starts, strict=True)):
        raise InputError("the model's chat template rewrites earlier turns; give a model whose template appends only.")
    pieces = [text[len(start) :] for text, start in zip(texts, starts, strict=True)]
    is_chat = _is_chat(tokenizer, sample)
    if not all(pieces):
        raise InputError("a question is empty; every turn needs some text.")
    return Dialogue(
        head=plain.encode(head, add_special_tokens=not is_chat) if head else [],
        pieces=[
            plain.encode(piece, add_special_tokens=not (is_chat or head or turn)) for turn, piece in enumerate(pieces)
        ],
    )


def fit(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, mode: str, context_length: int, max_length: int | None
) -> Dialogue:
    """Encode a sample; where it is too long, leave out the middle of its text as LongBench does.

    Of one turn the prompt is cut before the chat template is put around it, of several the context. A sample that was
    made to a length is not cut.

    Args:
        tokenizer: see `encode`.
        sample: see `encode`.
        mode: see `encode`.
        context_length: the most tokens that prompt and answer may have together.
        max_length: the most tokens of the text that may be cut; None allows as many as there is room for.

    Raises:
        InputError: the sample was made to a length and does not fit, its questions alone do not fit, or as in `encode`.
    """
    whole = encode(tokenizer, sample, mode)
    is_single = len(sample.turns) == 1
    body = sample.context + (sample.turns[0].question if is_single and mode == "multi_turn" else "")
    plain = PlainText(tokenizer)
    body_ids = plain.encode(plain.hide(body), add_special_tokens=True)
    excess = whole.needed_tokens(sample.turns) - context_length
    kept = len(body_ids) - max(0, excess)
    if max_length is not None:
        kept = min(kept, max_length)
    if kept == len(body_ids):
        return whole
    if sample.length is not None:
        raise InputError(
            f"prompt and answer need {context_length + excess} tokens, but the model was made for {context_length}; "
            "ask for shorter lengths."
            if excess > 0
            else f"its text has {len(body_ids)} tokens, more than max_length={max_length}; ask for shorter lengths."
        )
    while kept >= 2:
        half = kept // 2
        halves = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (body_ids[:half], body_ids[-half:]))
        text = "".join(halves)
        turns = sample.turns if body == sample.context else [replace(sample.turns[0], question="")]
        cut = encode(tokenizer, replace(sample, context=text, turns=turns), mode)
        excess = cut.needed_tokens(sample.turns) - context_length
        if excess <= 0:
            return cut
        kept -= excess  # a cut text may encode to more tokens than it was cut to
    raise InputError(f"its questions and answers leave no room in the model's {context_length} tokens.")


def _hide(plain: PlainText, sample: Sample) -> Sample:
    """Return the sample with all text that looks like special tokens hidden; see `PlainText`."""
    turns = [
        replace(
            turn,
            question=plain.hide(turn.question),
            answers=[plain.hide(answer) for answer in turn.answers],
            answer_prefix=plain.hide(turn.answer_prefix),
        )
        for turn in sample.turns
    ]
    return replace(sample, context=plain.hide(sample.context), turns=turns)


def _render(tokenizer: PreTrainedTokenizerBase, sample: Sample, turn: int, mode: str) -> str:
    """Return all text that the model sees before it answers turn `turn`."""
    first = turn if mode == "multi_request" else 0
    asked = sample.turns[first : turn + 1]
    questions = [("" if k else sample.context) + each.question for k, each in enumerate(asked)]
    answers = [_right_answer(each) for each in asked[:-1]]
    prefix = asked[-1].answer_prefix
    if not _is_chat(tokenizer, sample):
        return "".join(q + a for q, a in zip(questions, [*answers, prefix], strict=True))
    messages = [{"role": "user", "content": questions[0]}]
    for answer, question in zip(answers, questions[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(f"the model's chat template refuses the prompt ({error}).") from None
    return str(rendered) + prefix


def _right_answer(turn: Turn) -> str:
    gap = " " if turn.answer_prefix and not turn.answer_prefix[-1].isspace() else ""
    return turn.answer_prefix + gap + turn.answers[0]


def _is_chat(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> bool:
    return sample.chat and tokenizer.chat_template is not None
