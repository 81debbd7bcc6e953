"""Answers the Makefile about versions: the lowest that pyproject.toml claims, and whether a failure counts.

python tests/claimed.py lowest transformers torch  # prints the lowest versions that are claimed, as pip takes them
python tests/claimed.py failed  # after failed tests: exits with 1 if the versions at hand are claimed
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


def lowest(name: str) -> str:
    """Return the lower bound of a dependency in pyproject.toml, as a requirement of pip."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    specifier = next(r.specifier for r in map(Requirement, project["dependencies"]) if r.name == name)
    return next(f"{name}=={part.version}" for part in specifier if part.operator == ">=")


def failed() -> int:
    """Print which version failed; return 1 if pyproject.toml claims that version, else 0."""
    from rocketkv.hf.versions import dependency

    found = [dependency(name) for name in ("transformers", "torch")]
    newer = [f for f in found if not f.is_tested]
    for f in newer:
        print(f"\n*** NOT SUPPORTED YET: {f.name} {f.installed} fails; rocketkv claims {f.name}{f.tested}. ***\n")
    if not newer:
        print("\n*** FAILED on versions that rocketkv claims: " + ", ".join(f"{f.name} {f.installed}" for f in found))
    return 0 if newer else 1


if __name__ == "__main__":
    if sys.argv[1] == "lowest":
        print(*map(lowest, sys.argv[2:]))
    else:
        sys.exit(failed())
