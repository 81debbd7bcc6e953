"""`rocketkv generate`: answers, sampling, and what is refused before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from rocketkv.hf.models import LoadedModel
from tiny import save_tiny


@pytest.mark.usefixtures("uncompiled_graph")
def test_generate_fast_gives_the_same_answer(run: Any, tmp_path: Path, document: str) -> None:
    save_tiny(tmp_path / "model")
    Path(document).write_text(Path(document).read_text()[:1000])
    arguments = ("generate", "-f", document, "-q", "What?", "-m", str(tmp_path / "model"), "-t", "64", "--json")
    plain, fast = (run(*arguments, "--max-new-tokens", "8", *extra) for extra in ((), ("--fast",)))
    assert fast.exit_code == 0, fast.output
    assert json.loads(fast.stdout)["rocketkv"]["text"] == json.loads(plain.stdout)["rocketkv"]["text"]


def test_generate_with_quantized_weights(run: Any, tmp_path: Path, document: str) -> None:
    save_tiny(tmp_path / "model", head_dim=32, intermediate_size=128)
    Path(document).write_text(Path(document).read_text()[:1000])
    arguments = ("generate", "-f", document, "-q", "What?", "-m", str(tmp_path / "model"), "-t", "64", "--json")
    result = run(*arguments, "--max-new-tokens", "8", "--weight-dtype", "int4")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rocketkv"]["new_tokens"] > 0


def test_generate_answers_and_compares(run: Any, loaded: LoadedModel, document: str) -> None:
    question = "What does the license say?"
    arguments = ("generate", "-f", document, "-q", question, "-t", "128", "--max-new-tokens", "6", "--compare")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    for part in ("RocketKV t=128", "full cache", "held MiB", "read MiB"):
        assert part in result.stdout
    record = json.loads(run(*arguments, "--json").stdout)
    assert (record["model"], record["token_budget"]) == ("smollm2", 128)
    ours, full = record["rocketkv"], record["full_cache"]
    assert ours["prompt_tokens"] == full["prompt_tokens"] > 800
    assert ours["new_tokens"] == 6
    assert ours["text"] in result.stdout.replace("\n", " ") or ours["text"].split("\n")[0] in result.stdout
    assert ours["stats"]["total"]["read_bytes"] < full["stats"]["total"]["read_bytes"] / 4
    assert ours["stats"]["total"]["full_read_bytes"] == full["stats"]["total"]["read_bytes"]
    assert len(ours["stats"]["layers"]) == 30


def test_generate_reads_standard_input_and_samples(run: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    arguments = (
        "generate",
        "-f",
        "-",
        "-q",
        "What?",
        "-m",
        str(tmp_path),
        "-t",
        "64",
        "--max-new-tokens",
        "8",
        "--json",
    )
    drawn = (*arguments, "--do-sample", "--temperature", "2", "--top-k", "50", "--top-p", "0.9", "--seed")
    text = "A text. " * 40

    def answer(*given: str) -> str:
        result = run(*given, stdin=text)
        assert result.exit_code == 0, result.output
        return str(json.loads(result.stdout)["rocketkv"]["text"])

    assert answer(*drawn, "1") == answer(*drawn, "1") != answer(*drawn, "2")
    assert answer(*arguments) == answer(*arguments, "--repetition-penalty", "1.0")
    drawn_too = [option for option in drawn if option != "--do-sample"]
    assert answer(*drawn_too, "1", "--min-p", "0") == answer(*drawn, "1")
    result = run(*arguments, "--system", "Be brief.", stdin=text)
    assert "no chat template and so no system prompt" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--temperature 0", "--temperature 0.0 is out of range; give a number above 0."),
        ("--do-sample --temperature nan", "--temperature nan is out of range"),
        ("--do-sample --temperature inf", "--temperature inf is out of range"),
        ("--do-sample --top-p 1.5", "--top-p 1.5 is out of range; give a number above 0 and at most 1."),
        ("--do-sample --top-k -1", "--top-k -1 is out of range; give 0 or more."),
        ("--do-sample --min-p 2", "--min-p 2.0 is out of range; give a number from 0 to 1."),
        ("--do-sample --seed -1", "--seed -1 is out of range"),
        ("--repetition-penalty 0", "--repetition-penalty 0.0 is out of range"),
    ],
)
def test_sampling_options_that_make_no_sense_are_refused(run: Any, document: str, options: str, message: str) -> None:
    for command in (("generate", "-q", "What?"), ("chat",)):
        result = run(*command, "-f", document, *options.split())
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-t", "16"), "token_budget=16 is smaller than window_size=32; raise token_budget or lower window_size."),
        (("-f", "missing.txt"), "missing.txt cannot be read (No such file or directory)"),
        (("-f", "folder"), "folder cannot be read (Is a directory)"),
        (("-f", "binary.txt"), "binary.txt is not UTF-8 text (invalid start byte at byte 0)"),
        (("-f", "empty.txt"), "empty.txt is empty; give a file with text."),
        (("-m", "/no/model"), "model '/no/model' is neither a folder nor a GGUF file"),
        (("-m", "no-such-model"), "model 'no-such-model' cannot be loaded"),
        (("--dtype", "int3"), "dtype='int3' does not exist"),
        (("--device", "cuda:99"), "--device cuda:99 is not there; choose from cpu"),
        (("--show-kept", "--json"), "--show-kept draws for a reader and --json writes for a program"),
        (("--weight-dtype", "int3"), "weight_dtype='int3' does not exist; choose from int8, int4."),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A text.")
    Path("folder").mkdir()
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("empty.txt").write_text(" \n")
    result = run("generate", "-f", "text.txt", "-q", "What?", *arguments)
    assert result.exit_code == 2
    assert "error: " + message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_text_longer_than_the_context_is_refused(run: Any, loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 9000)
    result = run("generate", "-f", str(path), "-q", "What?")
    assert result.exit_code == 2
    assert "in the 8192 that the model was made for; give a shorter text or another model." in result.stderr


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\x00", "is not UTF-8 text"), (b" \n", "is empty; give a file with text.")]
)
def test_standard_input_that_is_no_text_is_one_sentence(run: Any, content: bytes, message: str) -> None:
    result = run("generate", "-f", "-", "-q", "What?", stdin=content)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: standard input {message}")
