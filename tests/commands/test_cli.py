"""The command line as a user meets it: start-up, exit codes, broken streams, and the way out of a refusal."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from rocketkv import cli


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from rocketkv.cli import app\n"
        "for command in ('', 'generate', 'chat', 'prefill', 'store', 'store list', 'budget', 'recommend', 'info',\n"
        "                'models', 'eval run', 'eval report', 'bench', 'bench attention', 'bench decode',\n"
        "                'bench prefill', 'bench reuse', 'bench memory'):\n"
        "    result = CliRunner().invoke(app, [*command.split(), '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr


def test_budget_explains_the_split(run: Any) -> None:
    sizes = ("budget", "--seq-len", "131072", "--token-budget", "512")
    for more, parts, record in (
        ((), ("256.0 x", "4096 tokens", "27 of 128"), {"kept_tokens": 4096, "top_k": 384}),
        (
            ("--selection", "hybrid"),
            ("256.0 x", "3019", "1007 pages of 3", "65 of 128", "512 tokens' worth"),
            {"kept_tokens": 3019, "page_size": 3, "num_channels": 65, "top_k": 255},
        ),
        (
            ("--kv-dtype", "int8"),
            ("24 of 128", "667", "by these scores, int8", "507 tokens' worth"),
            {"kept_tokens": 6144, "top_k": 667},
        ),
    ):
        result = run(*sizes, *more)
        assert result.exit_code == 0
        for part in parts:
            assert part in result.stdout
        assert json.loads(run(*sizes, *more, "--json").stdout).items() >= record.items()
    assert "nothing is evicted" in run("budget", "--seq-len", "100").stdout
    assert "all are attended, by default (dense_below=512)" in run("budget", "--seq-len", "400").stdout
    dense = json.loads(run(*sizes, "--selection", "dense", "--json").stdout)
    assert dense["top_k"] == dense["kept_tokens"]
    assert "all" in run(*sizes, "--selection", "dense").stdout
    assert "did you mean hybrid?" in run(*sizes, "--selection", "hybird", "--kv-dtype", "int8").stderr


@pytest.mark.parametrize(
    ("command", "message", "way_out"),
    [
        ("budget --seq-len 5000 -t 10", "raise token_budget or lower window_size", "--token-budget 32"),
        ("budget --seq-len 5000 -t 10", "raise token_budget or lower window_size", "--window-size 10"),
        ("budget --seq-len 500 --selection exact --kv-dtype int8", "set kv_dtype='auto'", "--kv-dtype auto"),
        ("budget --seq-len 500 --new-tokens -1", "give 0 or more", "--new-tokens 0"),
        ("info -g smollm2-135m --selection exact --kv-dtype int8", "set kv_dtype='auto'", "--kv-dtype auto"),
    ],
)
def test_the_way_out_of_a_refusal_is_one_that_the_command_takes(
    run: Any, command: str, message: str, way_out: str
) -> None:
    refused = run(*command.split())
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert run(*command.split(), *way_out.split()).exit_code == 0


def test_bench_does_not_advise_an_option_that_it_has_not(run: Any) -> None:
    for command in ("attention", "decode", "prefill", "memory"):
        refused = run("bench", command, "-t", "512,10")
        assert refused.exit_code == 2
        assert "token_budget=10 is smaller than window_size=32" in refused.stderr
        assert refused.stderr.endswith("give a larger --token-budget.\n")


def test_version_and_short_help(run: Any) -> None:
    assert run("--version").stdout.startswith("rocketkv ")
    assert "--install-completion" in run("--help").stdout
    for command in ("", "generate", "eval", "eval run", "bench decode"):
        assert run(*command.split(), "-h").stdout == run(*command.split(), "--help").stdout != ""


def test_an_error_in_a_real_process_leaves_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rocketkv", "generate", "-f", str(tmp_path / "missing"), "-q", "What?"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_warning_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def app() -> None:
        warnings.simplefilter("default")
        warnings.warn("the file was [left] out.", stacklevel=1)

    monkeypatch.setattr(cli, "app", app)
    cli.main()
    assert capsys.readouterr().err == "warning: the file was [left] out.\n"


def in_a_shell(redirected: str) -> tuple[int, str]:
    """Run `rocketkv` with arguments and redirections; return its exit code and its standard error."""
    command = f"{sys.executable} -m rocketkv {redirected}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("redirected", "code", "message"),
    [
        ("--help > /dev/full", 2, "standard output cannot be written (No space left on device)"),
        ("budget --seq-len 5000 > /dev/full", 2, "standard output cannot be written (No space left on device)"),
        ("budget --seq-len 5000 --json > /dev/full", 2, "standard output cannot be written (No space left on device)"),
        ("budget --seq-len 5000 >&-", 2, "standard output is closed"),
        ("generate -f - -q What? <&-", 2, "standard input is closed"),
    ],
)
def test_a_stream_that_cannot_be_used_is_one_sentence(redirected: str, code: int, message: str) -> None:
    found, said = in_a_shell(redirected)
    assert found == code, said
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["budget --seq-len 5000", "budget --seq-len 5000 --json", "eval run --help"])
def test_who_has_read_enough_may_go(command: str) -> None:
    assert in_a_shell(f"{command} | true") == (1, "")


def test_standard_error_that_cannot_be_written_changes_no_exit_code_to_success() -> None:
    assert in_a_shell("budget --seq-len 10 -t 1 2> /dev/full")[0] != 0
    assert in_a_shell("budget --seq-len 10 -t 1 2>&-")[0] != 0
