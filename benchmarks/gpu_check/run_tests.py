"""Runs pytest in a process of its own, and tells of each test as soon as it has ended."""

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# What pytest -v prints when a test has ended: alone, and in several processes.
ALONE = re.compile(r"(?P<test>\S+::\S+) (?P<outcome>PASSED|FAILED|SKIPPED|ERROR)\b.*\[ *\d+%\]")
TOGETHER = re.compile(r"\[gw\d+\] \[ *\d+%\] (?P<outcome>PASSED|FAILED|SKIPPED|ERROR) (?P<test>\S+::\S+)")
# Nothing is built, another torch may deprecate what this one does not, and its compiler gives advice on float32; the
# suite takes warnings for errors.
EXPECTED = (
    "ignore:on this CPU rocketkv:RuntimeWarning",
    "ignore:TensorFloat32 tensor cores:UserWarning",
    "default::DeprecationWarning",
    "default::FutureWarning",
)


def run_tests(command: Sequence[str], arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run pytest; yield a row for each test that has ended, and one with an `error` if pytest does not end well.

    Args:
        command: what starts Python.
        arguments: those of pytest.
    """
    tolerant = [argument for warning in EXPECTED for argument in ("-W", warning)]
    options = ["-v", "--tb=line", "-p", "no:cacheprovider", *tolerant]
    lines: list[str] = []
    with subprocess.Popen(
        [*command, "-m", "pytest", *options, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if (found := ALONE.match(line) or TOGETHER.match(line)) is not None:
                yield {"test": found["test"], "outcome": found["outcome"].lower()}
    if process.returncode != 0:
        yield {"error": f"pytest ended with status {process.returncode}", "output": "".join(lines)[-2000:]}
