"""Scripts outside the package import names of ours that exist."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    str(path.relative_to(ROOT)) for folder in ("benchmarks", "studies") for path in ROOT.glob(f"{folder}/**/*.py")
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_imports_of_us_exists(script: str) -> None:
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rocketkv":
            module = import_module(str(node.module))
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
