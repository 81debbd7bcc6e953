"""Tests that the walk through the code names files and things that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`([\w/]+\.py): ([\w.]+)`", (ROOT / "docs" / "walk.md").read_text(encoding="utf-8"))


def test_the_walk_names_things() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_the_walk_names_exists(file: str, name: str) -> None:
    body = ast.parse((ROOT / "src" / "rocketkv" / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part]
        assert found, f"{file} defines no {name}"
        body = found[0].body
