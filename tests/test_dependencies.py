"""What the package imports is what its distribution asks for; docs/dependencies.md names all of it."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "rocketkv"
PROJECT = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {  # the files that need an extra, by the beginning of their path
    "backends/cuda": ("cuda",),
    "backends/triton": ("triton",),
    "figures": ("plot",),
    "bench/plot": ("plot",),
    "eval": ("eval",),
    "eval/harness": ("eval", "harness"),
}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=\[;]", requirement, maxsplit=1)[0] for requirement in requirements}


def imported(file: Path) -> Iterator[str]:
    """Yield the packages that a file imports, at its top or in a function; those for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        yield from (module.split(".")[0] for module in modules)


@pytest.mark.parametrize("folder", sorted(path.name for path in SOURCE.iterdir() if path.name != "__pycache__"))
def test_nothing_is_imported_that_is_not_asked_for(folder: str) -> None:
    path = SOURCE / folder
    for file in [path] if path.suffix == ".py" else path.rglob("*.py"):
        place = file.relative_to(SOURCE).as_posix()
        allowed = names(PROJECT["dependencies"]) | set(sys.stdlib_module_names) | {"rocketkv"}
        for extra in (extra for start, extras in EXTRAS.items() if place.startswith(start) for extra in extras):
            allowed |= names(PROJECT["optional-dependencies"][extra])
        shorter = (re.sub("-(py|core)$", "", name) for name in allowed)  # markdown-it-py is markdown_it
        modules = {name.replace("-", "_") for name in shorter}
        assert set(imported(file)) <= modules, place


def test_the_page_names_every_dependency() -> None:
    page = ROOT.joinpath("docs", "dependencies.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`]+)`", page))
    named |= {f"tree-sitter{name}" for name in named if name.startswith("-")}
    asked = names(PROJECT["dependencies"])
    for requirements in PROJECT["optional-dependencies"].values():
        asked |= names(requirements)
    assert asked - {"rocketkv"} <= named
