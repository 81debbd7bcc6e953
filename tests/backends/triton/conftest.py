"""The kernels run in Triton's interpreter, on blocks so small that short rows have several."""

from collections.abc import Iterator

import pytest

from rocketkv.backends import triton
from rocketkv.backends.triton import sizes


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that short rows have several, and one of them is not full."""
    for name, value in {"PART": 32, "TILE": 16, "BLOCK": 64}.items():
        monkeypatch.setattr(sizes, name, value)


@pytest.fixture(autouse=True)
def reload() -> Iterator[None]:
    """Load the kernels anew after a test that made loading them fail."""
    yield
    triton._load.cache_clear()
