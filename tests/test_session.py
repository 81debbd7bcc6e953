"""Conversations on the real small model: what the cache has seen is what was said."""

from typing import Any

import pytest

from rocketkv import InputError, RocketKVConfig, disable
from rocketkv.models import LoadedModel
from rocketkv.session import Session

CONFIG = RocketKVConfig(token_budget=64, mode="multi_turn")


@pytest.fixture(autouse=True)
def _restored(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    yield
    disable(smollm2.model)


def said(session: Session) -> str:
    return session.loaded.tokenizer.decode(session._token_ids)


def test_the_cache_sees_the_rendered_conversation_and_nothing_twice(smollm2: LoadedModel) -> None:
    session = Session(smollm2, CONFIG, max_new_tokens=40)
    for message in ("Say the word yes.", "Say the word no.", "Thank you."):
        answer = session.send(message)
        assert answer.new_tokens <= 40
        assert session.cache.get_seq_length() == len(session._token_ids) - 1  # the last token is yet to be read
    rendered = smollm2.tokenizer.apply_chat_template(session.messages, tokenize=False)
    assert rendered.startswith(said(session).removesuffix("<|im_end|>").rstrip())
    assert "<|im_end|><|im_end|>" not in said(session)


def test_what_breaks_off_resets_the_conversation(smollm2: LoadedModel) -> None:
    def fails(text: str) -> None:
        raise BrokenPipeError

    session, fresh = (Session(smollm2, CONFIG, max_new_tokens=6) for _ in range(2))
    with pytest.raises(BrokenPipeError):
        session.send("Name three colours, please.", on_text=fails)
    assert session.cache.get_seq_length() == 0
    assert session.messages == []
    assert session.send("What is water?").text == fresh.send("What is water?").text


def test_a_base_model_continues_a_text(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.tokenizer, "chat_template", None)
    session = Session(smollm2, CONFIG, max_new_tokens=5)
    session.send("Question: what is red?")
    session.send("Question: what is blue?")
    assert said(session).count("Answer:") == 2
    assert "Question: what is red?\n\nAnswer:" in said(session)


def test_a_template_that_refuses_or_rewrites_is_one_sentence(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(smollm2, CONFIG, max_new_tokens=3)
    session.send("Hello.")
    monkeypatch.setattr(smollm2.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="chat template refuses this conversation"):
        session.send("And?")
    monkeypatch.setattr(smollm2.tokenizer, "chat_template", "{{ messages[-1].content }}")
    with pytest.raises(InputError, match="rewrites earlier turns"):
        session.send("And?")
    assert len(session.messages) == 2  # the conversation stays as it was


def test_progress_is_told_layer_by_layer(smollm2: LoadedModel) -> None:
    told: list[tuple[int, int]] = []
    pieces: list[str] = []
    answer = Session(smollm2, CONFIG, max_new_tokens=8).send(
        "What is a cat?", on_text=pieces.append, on_layer=lambda done, total: told.append((done, total))
    )
    assert told == [(i, 30) for i in range(1, 31)]
    assert "".join(pieces).strip() == answer.text
