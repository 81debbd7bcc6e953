"""Tests that the examples of the README and the method page run."""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rocketkv import RocketKVCache, RocketKVConfig, enable
from rocketkv.cli import app
from rocketkv.hf.versions import CACHE_ARGUMENT
from tiny import prompts, save_tiny, tiny_model

ROOT = Path(__file__).parents[1]
README = ROOT.joinpath("README.md").read_text()


def test_the_python_examples_run_and_are_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    save_tiny(tmp_path)
    names: dict[str, Any] = {"name": str(tmp_path), "text": "A long text. " * 60}
    for example in (first, second):
        assert len([line for line in example.splitlines() if line]) < 12
        exec(example.replace("cache=cache", f"{CACHE_ARGUMENT}=cache"), names)  # the README shows what 5.24 takes
    assert "LayerStats(num_seen=" in capsys.readouterr().out
    assert names["cache"].get_seq_length() == names["output"].shape[1] - 1  # nothing was taken in twice


@torch.inference_mode()
def test_the_turns_of_the_method_page_run() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", ROOT.joinpath("docs", "method.md").read_text(), re.DOTALL)
    names = {
        "torch": torch,
        "RocketKVCache": RocketKVCache,
        "RocketKVConfig": RocketKVConfig,
        "model": enable(tiny_model("llama")),
        "document_and_question": prompts(300)[0],
        "next_question": prompts(20, seed=1)[0],
    }
    names["model"].generation_config.update(eos_token_id=None, do_sample=False)
    exec(example.replace("cache=cache", f"{CACHE_ARGUMENT}=cache"), names)
    assert names["second"].shape[1] == 300 + 30 + 20 + 30
    assert names["cache"].get_seq_length() == names["second"].shape[1] - 1  # nothing was taken in twice


def test_every_command_it_names_exists() -> None:
    commands = re.findall(r"^    rocketkv (.*)$", README, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        options = [word for word in command.split() if word.startswith("--")]
        name = list(takewhile(lambda word: not word.startswith("--"), command.split()))
        help_text = CliRunner().invoke(app, [*name, "--help"]).output
        assert all(option in help_text for option in options), command
