"""The text that a model is given: the right turns, special tokens as text, and what is cut."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from eval_inputs import byte_tokenizer
from eval_runs import CHAT, make_sample, turn
from rocketkv import InputError
from rocketkv.eval.data.dialogue import encode, fit
from rocketkv.eval.data.samples import Sample


def texts(tokenizer: PreTrainedTokenizerFast, sample: Sample, mode: str) -> list[str]:
    dialogue = encode(tokenizer, sample, mode)
    return [tokenizer.decode(ids) for ids in ([dialogue.head] if dialogue.head else []) + dialogue.pieces]


SHORT = Sample(
    "a", "small", "times", "The text.", [turn(" One?", "first", "other", prefix="It is"), turn("Two?", "second")], True
)


def test_turns_follow_the_right_answers() -> None:
    first = "<user>The text. One?</s>\n<assistant>It is"
    assert texts(byte_tokenizer(CHAT), SHORT, "multi_turn") == [first, " first</s>\n<user>Two?</s>\n<assistant>"]
    assert texts(byte_tokenizer(None), SHORT, "multi_turn") == ["The text. One?It is", " firstTwo?"]
    literal = replace(SHORT, chat=False)
    assert texts(byte_tokenizer(CHAT), literal, "multi_turn") == ["The text. One?It is", " firstTwo?"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("mode", ["multi_turn", "multi_request"])
def test_special_tokens_in_a_sample_are_text(chat: bool, mode: str) -> None:
    tokenizer = byte_tokenizer(CHAT)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    turns = [turn(" One </s>?", "fi</s>rst", prefix="</s>It"), turn("Two?</s>", "second")]
    sample = replace(SHORT, context="The </s>text.", turns=turns, chat=chat)
    dialogue = encode(tokenizer, sample, mode)
    ids = [i for piece in (dialogue.head, *dialogue.pieces) for i in piece]
    from_template = (3 if mode == "multi_turn" else 2) if chat else 0
    assert ids.count(tokenizer.eos_token_id) == from_template
    assert tokenizer.decode(ids).count("</s>") == from_template + (5 if mode == "multi_turn" else 4)
    cut = fit(tokenizer, replace(sample, context="</s>" * 100), mode, 200, None)
    assert 0 < cut.needed_tokens(turns) <= 200
    assert sum(piece.count(tokenizer.eos_token_id) for piece in (cut.head, *cut.pieces)) == from_template


def test_requests_follow_the_context() -> None:
    head = "<user>The text."
    expected = [head, " One?</s>\n<assistant>It is", "Two?</s>\n<assistant>"]
    assert texts(byte_tokenizer(CHAT), SHORT, "multi_request") == expected
    literal = replace(SHORT, chat=False)
    assert texts(byte_tokenizer(CHAT), literal, "multi_request") == ["The text.", " One?It is", "Two?"]


def test_tokens_of_a_prompt_are_counted() -> None:
    dialogue = encode(byte_tokenizer(None), SHORT, "multi_turn")
    assert [dialogue.prompt_tokens(k) for k in range(2)] == [19, 29]
    assert dialogue.needed_tokens(SHORT.turns) == 35
    dialogue = encode(byte_tokenizer(None), SHORT, "multi_request")
    assert [dialogue.prompt_tokens(k) for k in range(2)] == [19, 13]
    assert dialogue.needed_tokens(SHORT.turns) == 25


def test_special_tokens_stand_at_the_start_of_literal_text_only() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(CHAT)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 0)])
    literal = replace(SHORT, chat=False)
    assert [piece[0] == 0 for piece in encode(tokenizer, literal, "multi_turn").pieces] == [True, False]
    requests = encode(tokenizer, literal, "multi_request")
    assert [ids[0] == 0 for ids in (requests.head, *requests.pieces)] == [True, False, False]
    assert all(0 not in piece for piece in encode(tokenizer, SHORT, "multi_turn").pieces)


@pytest.mark.parametrize(
    ("template", "changes", "mode", "message"),
    [
        ("{{ raise_exception('no users') }}", {}, "multi_turn", r"chat template refuses the prompt \(no users\)"),
        (
            "{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}",
            {},
            "multi_turn",
            "rewrites earlier turns; give a model whose template appends only",
        ),
        (CHAT.replace("['content']", "['content'] | upper"), {}, "multi_request", "does not begin with its context"),
        (CHAT, {"context": ""}, "multi_request", "does not begin with its context"),
        (None, {"turns": [turn("", "a")]}, "multi_request", "a question is empty"),
    ],
)
def test_what_cannot_be_rendered_is_refused(
    template: str | None, changes: dict[str, Any], mode: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        encode(byte_tokenizer(template), replace(SHORT, **changes), mode)


def test_the_middle_is_left_out_before_the_template_is_put_around() -> None:
    tokenizer, sample = byte_tokenizer(CHAT), make_sample(1)
    body = sample.context + sample.turns[0].question
    (piece,) = fit(tokenizer, sample, "multi_turn", 2048, 100).pieces
    assert tokenizer.decode(piece) == f"<user>{body[:50]}{body[-50:]}</s>\n<assistant>"
    whole = encode(tokenizer, sample, "multi_turn")
    assert fit(tokenizer, sample, "multi_turn", len(whole.pieces[0]) + 6, None) == whole
    (piece,) = fit(tokenizer, sample, "multi_turn", len(whole.pieces[0]) + 5, None).pieces
    assert len(piece) == len(whole.pieces[0]) - 1
    assert tokenizer.decode(piece).endswith("What is 1?</s>\n<assistant>")


@pytest.mark.parametrize("mode", ["multi_turn", "multi_request"])
def test_of_several_turns_the_context_is_cut(mode: str) -> None:
    tokenizer, sample = byte_tokenizer(CHAT), make_sample(1, turns=3)
    whole = encode(tokenizer, sample, mode)
    cut = fit(tokenizer, sample, mode, 200, None)
    assert 190 <= cut.needed_tokens(sample.turns) <= 200
    assert cut.pieces[1:] == whole.pieces[1:]
    start = texts(tokenizer, sample, mode)[0][:20]
    assert tokenizer.decode(cut.head or cut.pieces[0]).startswith(start)


def test_what_was_made_to_a_length_is_not_cut() -> None:
    tokenizer, sample = byte_tokenizer(CHAT), make_sample(1, length=250)
    with pytest.raises(InputError, match=r"need 2\d\d tokens, but the model was made for 200; ask for shorter"):
        fit(tokenizer, sample, "multi_turn", 200, None)
    with pytest.raises(InputError, match=r"has 251 tokens, more than max_length=100; ask for shorter lengths"):
        fit(tokenizer, sample, "multi_turn", 2048, 100)
    with pytest.raises(InputError, match="leave no room in the model's 20 tokens"):
        fit(tokenizer, make_sample(1), "multi_turn", 20, None)
