"""Files stay short enough to read: newcomers go through them one by one."""

from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
SOURCES = ("src/**/*.py", "src/**/*.cu", "src/**/*.cuh", "csrc/*.cpp", "csrc/*.h")


def num_lines(*patterns: str) -> dict[str, int]:
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8").count("\n") for file in files}


def test_no_file_is_long() -> None:
    lines = num_lines(*SOURCES, "tests/**/*.py")
    assert [file for file, count in lines.items() if count > 300] == []
    assert lines["src/rocketkv/attention.py"] < 250


def test_half_of_the_files_are_short() -> None:
    assert median(count for file, count in num_lines(*SOURCES).items() if "/eval/" not in file) < 90
