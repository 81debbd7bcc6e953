"""`rocketkv chat`: a conversation, and Ctrl-C at each of its moments."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rocketkv.hf.models import LoadedModel
from rocketkv.hf.session import _TimedStreamer


def test_chat_keeps_history_and_obeys(run: Any, loaded: LoadedModel, document: str) -> None:
    stdin = "What is this?\n/stats\nAnd who wrote it?\n/nonsense\n/reset\n/stats\nWhat is this?\n/quit\n"
    result = run("chat", "-f", document, "-t", "128", "--max-new-tokens", "5", stdin=stdin)
    assert result.exit_code == 0, result.output
    assert "RocketKV-MT t=128" in result.stdout
    assert "There is no command /nonsense" in result.stdout
    assert "The conversation is forgotten" in result.stdout
    assert "Nothing was asked yet." in result.stdout
    assert run("chat", "-f", document, stdin="").exit_code == 0  # end of input quits


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that has Ctrl-C pressed when a method of the streamer is called for the n-th time."""

    def press(method: str, number: int) -> None:
        real, calls = getattr(_TimedStreamer, method), []

        def pressing(*given: Any) -> None:
            calls.append(None)
            if len(calls) == number:
                signal.raise_signal(signal.SIGINT)
            real(*given)

        monkeypatch.setattr(_TimedStreamer, method, pressing)

    return press


def test_an_interrupt_ends_the_answer_and_not_the_chat(
    run: Any, loaded: LoadedModel, tmp_path: Path, interrupt: Any
) -> None:
    (tmp_path / "text").write_text("Water is wet.")
    chat = ("chat", "-f", str(tmp_path / "text"), "-t", "128", "--max-new-tokens", "30")
    interrupt("put", 3)  # the prompt is put first: within the second token
    handler = signal.getsignal(signal.SIGINT)
    result = run(*chat, stdin="Tell a long story.\n/stats\nGo on.\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Interrupted: the answer ends here; what was answered stays in the conversation.") == 1
    assert "RocketKV-MT t=128" in result.stdout
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupted_prefill_says_that_the_conversation_is_forgotten(
    run: Any, loaded: LoadedModel, tmp_path: Path, interrupt: Any
) -> None:
    (tmp_path / "text").write_text("Water is wet.")
    interrupt("__init__", 2)
    result = run(
        "chat", "-f", str(tmp_path / "text"), "--max-new-tokens", "2", stdin="What?\nAnd?\n/stats\nWhat?\n/stats\n"
    )
    assert result.exit_code == 0, result.output
    forgotten = "Interrupted before the answer began: the conversation is forgotten; the document stays."
    assert forgotten in " ".join(result.stdout.split())
    assert result.stdout.count("Nothing was asked yet.") == 1
    assert result.stdout.count("RocketKV-MT") == 1


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Let SIGINT interrupt, which a shell lets the programs ignore that it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_at_the_prompt_leaves(
    run: Any, loaded: LoadedModel, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: signal.raise_signal(signal.SIGINT))
    result = run("chat", "-f", document)
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_chat_takes_no_document_from_where_its_questions_come(run: Any) -> None:
    result = run("chat", "-f", "-", stdin="What?\n")
    assert result.exit_code == 2
    assert "give a file instead" in result.stderr


def test_chat_survives_a_message_that_does_not_fit(run: Any, loaded: LoadedModel, document: str) -> None:
    stdin = f"What is this?\n{'too long ' * 9000}\nAnd now?\n"
    result = run("chat", "-f", document, "-t", "128", "--max-new-tokens", "3", stdin=stdin)
    assert result.exit_code == 0, result.output
    assert "leaves no room for an answer in the 8192 that the model was made for" in result.stderr
