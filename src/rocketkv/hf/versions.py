"""Which versions of transformers and torch this package was tested with, and what differs between them.

The ranges stand in one place, the dependencies in `pyproject.toml`; this file reads them from the installed metadata,
or from that file itself where the package runs from its source tree.
"""

import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

# transformers 5.24 renamed the argument through which `generate`, models and layers take a cache.
CACHE_ARGUMENT = "cache" if Version(version("transformers")) >= Version("5.24.0.dev0") else "past_key_values"
CACHE_ARGUMENTS = ("cache", "past_key_values")


def pass_cache(cache: object) -> dict[str, Any]:
    """Return the keyword argument by which a model, a decoder or `generate` of transformers takes `cache`."""
    return {CACHE_ARGUMENT: cache}


class Dependency(NamedTuple):
    """A dependency at hand, beside the versions of it that were tested.

    Attributes:
        name: the package's name.
        installed: the version at hand.
        tested: the tested versions, as a specifier such as `>=5.16,<5.25`.
        is_tested: whether the version at hand is one of them.
    """

    name: str
    installed: str
    tested: str
    is_tested: bool


def dependency(name: str) -> Dependency:
    """Compare the version of a dependency at hand with the versions that were tested.

    Args:
        name: `transformers` or `torch`.

    Returns:
        The version at hand, the tested versions, and whether the former is one of the latter.
    """
    required = (Requirement(line) for line in _requirements())
    specifier = next(r.specifier for r in required if r.name == name and r.marker is None)
    installed = version(name)
    # A build such as 2.13.0+cpu, or a release candidate, counts as its release.
    is_tested = specifier.contains(Version(installed).base_version)
    order = sorted(specifier, key=lambda part: part.operator != ">=")
    return Dependency(name, installed, ",".join(str(part) for part in order), is_tested)


def _requirements() -> list[str]:
    """Return this package's requirements, one line each."""
    try:
        return requires("rocketkv") or []
    except PackageNotFoundError:  # nothing is installed
        project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines: list[str] = project["dependencies"]
        return lines
