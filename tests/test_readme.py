"""What the README shows must run."""

import re
from itertools import takewhile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rocketkv.cli import app
from rocketkv.versions import CACHE_ARGUMENT
from tiny import save_tiny

README = Path(__file__).parents[1].joinpath("README.md").read_text()


def test_the_python_examples_run_and_are_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    save_tiny(tmp_path)
    names = {"name": str(tmp_path), "text": "A long text. " * 60}
    for example in (first, second):
        assert len([line for line in example.splitlines() if line]) < 12
        exec(example.replace("cache=cache", f"{CACHE_ARGUMENT}=cache"), names)  # the README shows what 5.24 takes
    assert "LayerStats(num_seen=" in capsys.readouterr().out
    assert names["cache"].get_seq_length() == names["output"].shape[1] - 1  # nothing was taken in twice


def test_every_command_it_names_exists() -> None:
    commands = re.findall(r"^    rocketkv (.*)$", README, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        options = [word for word in command.split() if word.startswith("--")]
        name = list(takewhile(lambda word: not word.startswith("--"), command.split()))
        help_text = CliRunner().invoke(app, [*name, "--help"]).output
        assert all(option in help_text for option in options), command
