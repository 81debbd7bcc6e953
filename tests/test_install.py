"""The package from the bare source tree, where there are no kernels, as on a machine without a compiler."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
ANSWER = """
import json, warnings
import torch
from typer.testing import CliRunner
import rocketkv
from rocketkv.cli import app
from rocketkv.hf import pass_cache
from tiny import prompts, tiny_model

model = tiny_model("llama")
ids, mask = prompts(300)
asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
plain = model.generate(**asked).tolist()
rocketkv.enable(model)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    answers, backends = {}, set()
    for token_budget in (64, 1024):
        cache = rocketkv.RocketKVCache(model.config, rocketkv.RocketKVConfig(token_budget=token_budget))
        answers[token_budget] = model.generate(**asked, **pass_cache(cache)).tolist()
        backends |= {layer.cache.backend for layer in cache.layers}
    try:
        config = rocketkv.RocketKVConfig(token_budget=64, backend="cpp")
        model.generate(**asked, **pass_cache(rocketkv.RocketKVCache(model.config, config)))
    except rocketkv.UnsupportedError as error:
        refusal = str(error)
info = CliRunner().invoke(app, ["info", "--json"])
print(json.dumps({
    "is_exact": answers[1024] == plain,
    "num_tokens": len(answers[64][0]),
    "backends": sorted(backends),
    "warnings": [str(each.message) for each in caught if each.category is RuntimeWarning],
    "refusal": refusal,
    "version": CliRunner().invoke(app, ["--version"]).stdout,
    "info": json.loads(info.stdout),
}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a process finds that has the sources and the dependencies on its path, and no installed rocketkv."""
    paths = [str(TESTS.parent / "src"), str(TESTS), sysconfig.get_path("purelib")]
    command = [sys.executable, "-S", "-c", ANSWER]  # without `site`, which would find an editable installation
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_without_kernels_prompts_and_answers_run_in_plain_torch(found: dict[str, Any]) -> None:
    assert found["is_exact"]
    assert found["num_tokens"] == 304
    assert found["backends"] == ["reference"]


def test_without_kernels_one_warning_says_so_and_info_says_how_to_get_them(found: dict[str, Any]) -> None:
    (warning,) = found["warnings"]
    assert "plain torch" in warning
    assert "its native library is not installed" in warning
    assert "backend='cpp' declines this cache (cpp: its native library is not installed)" in found["refusal"]
    assert found["info"]["kernels"] == "its native library is not installed"
    assert "pip install" in found["info"]["to get the kernels"]


def test_the_bare_tree_knows_its_version(found: dict[str, Any]) -> None:
    assert found["version"].startswith("rocketkv 0.")
    assert found["version"].split()[1] == found["info"]["rocketkv"]
