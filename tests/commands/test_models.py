"""`rocketkv models`: what is at hand, and whether a compressed cache serves it."""

import json
from pathlib import Path
from typing import Any

import pytest

from rocketkv.hf.embedded import EMBEDDED, missing_wheels
from tiny import CONFIGS


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with a model that is served, one that is not, and one that is no model of transformers."""
    folder = tmp_path / "hub"
    for name, config in (
        ("served", CONFIGS["llama"].to_dict()),
        ("peculiar", {"model_type": "diffllama"}),
        ("unknown", None),
    ):
        repo = folder / f"models--someone--{name}"
        snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        snapshot.mkdir(parents=True)
        (snapshot / "weights").write_bytes(bytes(3 * 2**20))
        if config is not None:
            (snapshot / "config.json").write_text(json.dumps(config))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def test_models_lists_wheels_the_hub_cache_and_gguf_files(run: Any, hub: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(bytes(2**20))
    result = run("models", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    found = {each["name"]: each for each in json.loads(result.stdout)}
    assert {name for name in EMBEDDED if not missing_wheels(name)} <= set(found)
    assert found[str(tmp_path / "mine.gguf")]["bytes"] == 2**20
    assert found["someone/served"]["is_supported"] == "yes"
    assert found["someone/served"]["bytes"] > 3 * 2**20
    assert "its attention is the difference of two" in found["someone/peculiar"]["is_supported"]
    assert found["someone/unknown"]["is_supported"] == "no: it has no configuration of a model of transformers"
    shown = run("models", str(tmp_path)).stdout
    for part in ("someone/served", "mine.gguf", "hub cache", "MiB"):
        assert part in shown.replace("\n", "")


def test_models_says_when_there_are_none(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rocketkv.hf.embedded.missing_wheels", lambda name: [name])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no"))
    assert "There are no models at hand" in run("models", str(tmp_path)).stdout


def test_models_refuses_what_is_no_folder(run: Any, tmp_path: Path) -> None:
    result = run("models", str(tmp_path / "missing"))
    assert result.exit_code == 2
    assert "missing is no folder; give one" in result.stderr
