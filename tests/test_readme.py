"""Tests that the code of the README and of the documentation runs, and that its commands and messages exist."""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rocketkv import RocketKVCache, RocketKVConfig, enable
from rocketkv.cli import app
from rocketkv.hf.versions import CACHE_ARGUMENT
from tiny import prompts, save_tiny_chat, tiny_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
GUIDES = sorted(DOCS.glob("guides/*.md"))
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page; the pages show the argument that transformers takes since 5.24."""
    found = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [block.replace("cache=cache", f"{CACHE_ARGUMENT}=cache") for block in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model whose tokenizer can chat."""
    path = tmp_path_factory.mktemp("model")
    save_tiny_chat(path)
    return path


@pytest.mark.parametrize("page", [README, DOCS / "index.md"], ids=lambda path: path.stem)
def test_the_first_snippet_runs_as_pasted(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = blocks(page)
    assert snippet.count(HUB_NAME) == 1
    names: dict[str, Any] = {}
    exec(snippet.replace(HUB_NAME, str(folder)), names)
    assert "LayerStats(num_seen=" in capsys.readouterr().out
    assert names["cache"].get_seq_length() == names["output"].shape[1] - 1


def test_the_readme_is_one_screen() -> None:
    assert README.read_text(encoding="utf-8").count("\n") < 60


def test_the_readme_has_the_number_of_types_that_work() -> None:
    rows = re.findall(r"^\| yes .*", DOCS.joinpath("models.md").read_text(encoding="utf-8"), re.MULTILINE)
    types = {name for row in rows for name in re.findall(r"`(.*?)`", row)}
    assert f"[{len(types)} types in all]" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [guide for guide in GUIDES if blocks(guide)], ids=lambda path: path.stem)
def test_the_code_of_a_guide_runs(page: Path, folder: Path) -> None:
    model = enable(AutoModelForCausalLM.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "text": "A long text. " * 60}
    for block in blocks(page):
        exec(block, names)


@torch.inference_mode()
def test_the_turns_of_the_method_page_run() -> None:
    (example,) = blocks(DOCS / "method.md")
    names = {
        "torch": torch,
        "RocketKVCache": RocketKVCache,
        "RocketKVConfig": RocketKVConfig,
        "model": enable(tiny_model("llama")),
        "document_and_question": prompts(300)[0],
        "next_question": prompts(20, seed=1)[0],
    }
    names["model"].generation_config.update(eos_token_id=None, do_sample=False)
    exec(example, names)
    assert names["second"].shape[1] == 300 + 30 + 20 + 30
    assert names["cache"].get_seq_length() == names["second"].shape[1] - 1  # nothing was taken in twice


@pytest.mark.parametrize("page", [DOCS / "index.md", DOCS / "reuse.md", *GUIDES], ids=lambda path: path.stem)
def test_every_command_it_names_exists(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    commands = [line.removeprefix("    rocketkv ") for line in lines if line.startswith("    rocketkv ")]
    for command in [part.removeprefix("rocketkv ") for line in commands for part in line.split(" && ")]:
        options = [word for word in command.split() if word.startswith("--")]
        name = list(takewhile(lambda word: not word.startswith("-"), command.split()))
        while (result := CliRunner().invoke(app, [*name, "--help"])).exit_code:  # the last words are arguments
            name.pop()
        assert name, command
        assert all(option in result.output for option in options), command


def test_every_message_of_the_troubleshooting_page_exists() -> None:
    page = DOCS.joinpath("guides", "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^## `(.+)`$", page, re.MULTILINE)
    assert len(messages) > 10
    sources = " ".join(path.read_text(encoding="utf-8") for path in ROOT.glob("src/**/*.py"))
    sources = re.sub(r'"\s+f?"', "", sources)  # messages that run over several lines
    assert [message for message in messages if message not in sources] == []
