"""Runs each example and notebook on a tiny model, and holds them to the length of a screen."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from rocketkv.hf.versions import CACHE_ARGUMENT
from tiny import save_tiny_chat

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.joinpath("examples").glob("*.py"))
NOTEBOOKS = sorted(ROOT.joinpath("examples").glob("*.ipynb"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model whose tokenizer can chat."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_chat(folder)
    return folder


@pytest.mark.skipif(CACHE_ARGUMENT != "cache", reason="the examples show what transformers takes since 5.24")
@pytest.mark.filterwarnings("ignore::UserWarning")  # a tiny budget is exceeded on purpose
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    example: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The report was signed on Monday. " * 40, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(example), str(model), str(text)])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert example.read_text(encoding="utf-8").count("\n") < 60


@pytest.mark.skipif(CACHE_ARGUMENT != "cache", reason="the notebooks show what transformers takes since 5.24")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_has_outputs(notebook: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert sum(bool(cell["outputs"]) for cell in cells) >= 3
    assert not [output for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"]
    assert notebook.stat().st_size < 300_000


def test_the_readme_has_every_example() -> None:
    page = ROOT.joinpath("examples", "README.md").read_text(encoding="utf-8")
    for file in [*EXAMPLES, *NOTEBOOKS]:
        assert f"[{file.name}]({file.name})" in page
