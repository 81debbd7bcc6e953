"""`rocketkv info`: what a bug report needs, and which way the decode steps of a model go."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE

import rocketkv
from families import tiny_config
from rocketkv import LayerCache, RocketKVConfig
from rocketkv.backends import Spec, cpp, library
from rocketkv.commands.info import _meta_model
from rocketkv.selection import SELECTION_METHODS, Hybrid
from tiny import CONFIGS


def test_info_tells_what_a_bug_report_needs(run: Any) -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert {
        "rocketkv": rocketkv.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": library.instruction_set(),
        "model cache": HF_HUB_CACHE,
    }.items() <= facts.items()
    for name in ("torch", "transformers"):
        assert facts[name].startswith(f"{version(name)} (")
        assert "tested" in facts[name]
    shown = " ".join(run("info").stdout.split())
    for name in facts:
        assert f"{name} " in shown
    assert f"python {platform.python_version()} torch {version('torch')} (" in shown


@pytest.fixture
def describe(run: Any, tmp_path: Path) -> Any:
    """What `info` says of a tiny model's decode steps: its layers, and `backend="cpp"`."""

    def described(name: str, *options: str, **changes: Any) -> tuple[list[str], list[str]]:
        config = type(CONFIGS[name])(**CONFIGS[name].to_dict() | changes)
        config.save_pretrained(tmp_path)
        result = run("info", "--model", str(tmp_path), *options, "--json")
        assert result.exit_code == 0, result.output
        facts = json.loads(result.stdout)
        return facts["layers"], facts["backend=cpp"]

    return described


@pytest.fixture
def _kernels() -> None:
    if reason := cpp.decline(Spec("cpu", torch.float32, 64)):
        pytest.skip(reason)


@pytest.mark.usefixtures("_kernels")
def test_info_tells_which_way_decode_steps_go(describe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = "native kernels (cpp)"
    for mode in ("single_turn", "multi_turn"):
        assert describe("llama", "--mode", mode) == ([f"3 full-attention, head_dim=16: {fast}"], [fast])
    assert describe("llama", "--dtype", "bfloat16", "--kv-dtype", "int8")[1] == [fast]
    reference = "3 full-attention, head_dim=16: plain torch (backend=reference was chosen)"
    assert describe("llama", "--backend", "reference") == ([reference], [fast])
    assert describe("gemma3")[0] == [
        "1 sliding-window, head_dim=32: transformers' own cache, not compressed",
        f"2 full-attention, head_dim=32: {fast}",
    ]
    wide = "(cpp: head_dim=258 is more than 256)"
    assert describe("qwen3", head_dim=258) == (
        [f"3 full-attention, head_dim=258: plain torch {wide}"],
        [f"refused {wide}"],
    )
    assert describe("llama", dtype="float64")[1] == ["refused (cpp: it has no kernels for torch.float64)"]

    class Mine(Hybrid):
        scoring = "magic"  # type: ignore[assignment]  # none that a backend knows

    monkeypatch.setitem(SELECTION_METHODS, "mine", Mine)
    assert (
        "cpp: the selection method's scoring='magic' is none of dense, exact"
        in describe("llama", "--selection", "mine")[0][0]
    )


@pytest.mark.usefixtures("_kernels")
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    ("kind", "name", "layers"),
    [
        ("gemma3", "Gemma3ForConditionalGeneration", ["2 full-attention, head_dim=16: native kernels (cpp)"]),
        (
            "gemma4",  # of three layers of a kind, two share the cache of the first
            "Gemma4ForConditionalGeneration",
            [
                "3 sliding-window, head_dim=16: transformers' own cache, not compressed",
                "3 full-attention, head_dim=32: native kernels (cpp)",
            ],
        ),
    ],
)
def test_info_tells_of_models_that_see(run: Any, tmp_path: Path, kind: str, name: str, layers: list[str]) -> None:
    tiny_config(kind).save_pretrained(tmp_path)
    facts = json.loads(run("info", "--model", str(tmp_path), "--json").stdout)
    assert facts["decode of"].startswith(f"{name}, ")
    assert facts["layers"] == layers


def test_info_tells_what_a_cache_does(describe: Any) -> None:
    for head_dim, is_fused in ((256, True), (258, False)):
        (layer,), _ = describe("qwen3", head_dim=head_dim)
        cache = LayerCache(RocketKVConfig(token_budget=64))
        prompt, token = torch.randn(1, 2, 100, head_dim), torch.randn(1, 2, 1, head_dim)
        cache.prefill(prompt, prompt, prompt)
        cache.decode(token, token, token)
        assert (cache.backend == "cpp") == is_fused == ("native kernels" in layer)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere the kernels need no AVX2")
def test_info_on_a_cpu_without_avx2(tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    command = [sys.executable, "-m", "rocketkv", "info", "--model", str(tmp_path), "--json"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    facts = json.loads(result.stdout)
    reason = "this CPU runs DEFAULT code only; the kernels need AVX2"
    assert facts["kernels"] == reason
    assert facts["kernel dtypes"] == facts["kernel head_dim"] == facts["kernel selection"] == "none"
    assert facts["layers"] == [f"3 full-attention, head_dim=16: plain torch (cpp: {reason})"]
    assert reason not in result.stderr  # the table says what the library would warn of


@pytest.mark.usefixtures("_kernels")
def test_info_tells_what_the_kernels_take(run: Any) -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["kernel dtypes"] == "float32, bfloat16, float16"
    assert facts["kernel head_dim"] == "up to 256"
    assert facts["kernel selection"] == ", ".join(SELECTION_METHODS)
    result = run("info", "--geometry", "llama-3.1-8b")
    assert "32 full-attention, head_dim=128: native kernels (cpp)" in result.stdout
    assert _meta_model(None, "smollm2-135m", "auto").device.type == "meta"  # no memory for the weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-m", "/no/model"), "model '/no/model' is neither a folder nor a GGUF file"),
        (("-g", "x"), "geometry='x' does not exist"),
        (("--backend", "x"), "backend='x' does not exist"),
        (("-g", "qwen3-8b", "--selection", "hybird"), "selection='hybird' does not exist; did you mean hybrid?"),
        (("-g", "qwen3-8b", "--dtype", "int3"), "dtype='int3' does not exist"),
    ],
)
def test_info_refuses_what_does_not_exist(run: Any, options: tuple[str, ...], message: str) -> None:
    result = run("info", *options)
    assert result.exit_code == 2
    assert message in result.stderr
