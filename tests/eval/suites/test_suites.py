"""Every suite is found by its name."""

import pytest

from rocketkv.eval.suites import SUITES, find_suite


@pytest.mark.parametrize("name", list(SUITES))
def test_every_suite_is_found_by_its_name(name: str) -> None:
    suite = find_suite(name)
    assert suite.name == name
    assert len(suite.tasks) == len(set(suite.tasks))
    assert suite.tasks or name == "rows"  # whose tasks are those of the rows
