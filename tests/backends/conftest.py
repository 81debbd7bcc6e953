"""What the tests of the CPU's backends share: every backend and instruction set, and a second thread."""

from collections.abc import Iterator

import pytest
import torch

from rocketkv.backends import BACKENDS, Backend, Spec, cpp, library


@pytest.fixture(
    params=[(backend, None) for backend in BACKENDS if backend is not cpp and "cpu" in backend.DEVICES]
    + [(cpp, name) for name in library.library_names()],
    ids=lambda param: param[1] or param[0].NAME,
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Every backend of the CPU, the C++ one with every instruction set of this one."""
    backend, name = request.param
    if name is not None:
        monkeypatch.setattr(library, "library_names", lambda: [name])
        forget_library()
    reason = backend.decline(Spec("cpu", torch.float32, 64))
    if reason is not None:
        pytest.skip(f"{backend.NAME}: {reason}")
    yield backend
    forget_library()


def forget_library() -> None:
    library.load.cache_clear()
    library._native_dtypes.cache_clear()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Races and the sharing out of work show with more than one thread only; the suite itself runs on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
