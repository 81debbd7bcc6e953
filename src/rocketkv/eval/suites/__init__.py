"""The suites, one per file. A new one is a file with a `SUITE` and an entry in `SUITES`."""

from importlib import import_module
from typing import TYPE_CHECKING

from rocketkv.errors import InputError

if TYPE_CHECKING:
    from rocketkv.eval.suites.base import Suite

SUITES: dict[str, str] = {  # the module of each suite, imported on first use, by name
    "niah": "rocketkv.eval.suites.niah",
    "ruler": "rocketkv.eval.suites.ruler",
    "longbench": "rocketkv.eval.suites.longbench",
    "scbench": "rocketkv.eval.suites.scbench",
    "qa": "rocketkv.eval.suites.qa",
    "rows": "rocketkv.eval.suites.own_rows",
}


def find_suite(name: str) -> "Suite":
    """Return the suite of this name.

    Raises:
        InputError: there is none.
    """
    if name not in SUITES:
        raise InputError(f"suite {name!r} does not exist; choose from {', '.join(SUITES)} or fidelity.")
    suite: Suite = import_module(SUITES[name]).SUITE
    return suite
