"""A document is read once: `prefill`, `generate` and `chat` with `--cache` and `--store`, and `rocketkv store`."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rocketkv import disable
from rocketkv.cli import app
from rocketkv.hf.models import LoadedModel

QUESTION = ("--question", "What is a Contribution?", "--max-new-tokens", "6")


@pytest.fixture(autouse=True)
def _loaded(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr("rocketkv.hf.models.load", lambda name, dtype, weights: smollm2)
    yield
    disable(smollm2.model)


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "licence.txt"
    path.write_text(Path(__file__).parents[2].joinpath("LICENSE").read_text()[:3000])
    return str(path)


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def answer(*arguments: str) -> dict[str, Any]:
    result = run("generate", *arguments, *QUESTION, "--json")
    assert result.exit_code == 0, result.stderr
    record: dict[str, Any] = json.loads(result.stdout)["rocketkv"]
    return record


def test_a_saved_document_is_asked_without_being_read(document: str, tmp_path: Path) -> None:
    file = str(tmp_path / "doc.kv")
    result = run("prefill", "--file", document, "--out", file)
    assert result.exit_code == 0, result.stderr
    assert "tokens" in result.stdout
    first, second = (answer("--cache", file) for _ in range(2))
    assert first["text"] == second["text"]
    assert first["prompt_tokens"] < 30 < 500 < first["stats"]["total"]["num_seen"]
    asked = "What is a Contribution?\n/reset\nWhat is a Contribution?\n/quit\n"
    chat = run("chat", "--cache", file, "--max-new-tokens", "6", stdin=asked)
    assert chat.exit_code == 0, chat.stderr
    assert chat.stdout.count(first["text"]) == 2


def test_a_small_file_says_what_it_cannot_answer(document: str, tmp_path: Path) -> None:
    file = str(tmp_path / "doc.kv")
    result = run("prefill", "--file", document, "--out", file, "--single-turn", "-t", "64")
    assert "chosen by the document's last words and not by a question" in result.stdout
    assert answer("--cache", file)["prompt_tokens"] < 30


def test_the_store_is_filled_used_listed_measured_and_cleared(document: str, tmp_path: Path) -> None:
    assert "There are no stored caches" in run("store", "list").stdout
    first, second = (answer("--prompt-file", document, "--store") for _ in range(2))
    assert first["text"] == second["text"]
    listed = json.loads(run("store", "list", "--json").stdout)
    (entry,) = listed["caches"]
    assert entry["tokens"] > 500
    assert json.loads(run("store", "size", "--json").stdout)["bytes"] == entry["bytes"]
    assert entry["name"] in run("store", "list").stdout
    assert "1 caches" in run("store", "size").stdout
    chat = run("chat", "--file", document, "--store", *QUESTION[2:], stdin="What is a Contribution?\n/quit\n")
    assert first["text"] in chat.stdout
    folder = Path(listed["folder"])
    (folder / f".{entry['name']}.abc").write_bytes(bytes(2**20))  # a process was killed as it wrote
    assert json.loads(run("store", "size", "--json").stdout)["half_written_bytes"] == 2**20
    assert "1 caches and 1 half-written files, " in run("store", "size").stdout
    assert "1 caches and 1 half-written files, " in run("store", "clear").stdout
    assert json.loads(run("store", "size", "--json").stdout)["bytes"] == 0
    assert list(folder.iterdir()) == []


def test_what_does_not_fit_is_one_sentence(document: str, tmp_path: Path) -> None:
    file = str(tmp_path / "doc.kv")
    run("prefill", "--file", document, "--out", file)
    for arguments, message in (
        ((), "--prompt-file is the text and --cache what was read of one before; give one of them."),
        (("--prompt-file", document, "--cache", file), "leave one of them out"),
        (("--cache", str(tmp_path / "no.kv")), "no.kv is not there; give the path of a saved cache"),
        (("--cache", document), "licence.txt is no saved cache, or is damaged"),
        (("--cache", file, "--store"), "both say where what was read lies"),
        (("--cache", file, "--system", "Be brief."), "give --system to `rocketkv prefill`"),
        (("--cache", file, "--compare"), "give --prompt-file instead of --cache"),
        (("--cache", file, "-t", "100"), "--token-budget 100 is not what"),
    ):
        result = run("generate", *arguments, *QUESTION)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    result = run("prefill", "--file", document, "--out", str(tmp_path / "no" / "doc.kv"))
    assert (result.exit_code, "cannot be written" in result.stderr) == (2, True)
