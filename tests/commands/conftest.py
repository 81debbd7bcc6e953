"""What the tests of the commands share: a runner, the real model loaded once, and a document."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rocketkv import disable
from rocketkv.cli import app
from rocketkv.hf.models import LoadedModel


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, arguments, input=stdin)

    return invoke


@pytest.fixture
def loaded(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real model, loaded once for all tests instead of once a command."""
    monkeypatch.setattr("rocketkv.hf.models.load", lambda name, dtype, weights: smollm2)
    yield smollm2
    disable(smollm2.model)


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "licence.txt"
    path.write_text(Path(__file__).parents[2].joinpath("LICENSE").read_text()[:4000])
    return str(path)
