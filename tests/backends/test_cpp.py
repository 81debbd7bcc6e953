"""The C++ kernels' module: its stub, its constants, its linear layers and its output buffers."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from nanobind.stubgen import StubGen

from layers import DTYPES, make_layer
from rocketkv import backends
from rocketkv.backends import Backend, Scoring, cpp, library
from rocketkv.ops import int8, lowbit, pages

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("name", library.library_names())
def test_the_kernels_have_the_constants_of_the_reference(name: str) -> None:
    kernels = vars(import_module(name))
    reference = {**vars(pages), **vars(lowbit), **vars(int8)}
    constants = {key for key in kernels if key.isupper()}
    assert constants == {"PAGES_PER_BLOCK", "GROUP", "GROUPS_PER_BLOCK", "LEVELS", "STEP_CHANNELS", "NOT_FINITE"}
    assert {key: kernels[key] for key in constants} == {key: reference[key] for key in constants}
    assert {scoring.name for scoring in kernels["Scoring"]} == {*Scoring}


@pytest.mark.parametrize("name", library.library_names())
def test_the_stub_describes_the_kernels(name: str) -> None:
    kernels, stub = import_module(name), Path(cpp.__file__).with_name("_kernels.pyi")
    generator = StubGen(kernels)
    generator.put(kernels)
    command = f"python -m nanobind.stubgen -m {name} -o {stub.name}"
    is_current = ast.dump(ast.parse(stub.read_text())) == ast.dump(ast.parse(generator.get()))
    assert is_current, f"{stub.name} is not what `{command}` and `ruff format` write"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_in", "num_out"), [(1, 64, 33), (2, 576, 50), (3, 20, 1), (5, 257, 300), (8, 96, 17)]
)
def test_linear_is_a_matrix_product(
    seeded: torch.Generator, dtype: torch.dtype, rows: int, num_in: int, num_out: int
) -> None:
    x = torch.randn(rows, num_in, generator=seeded).to(dtype)
    weight = torch.randn(num_out, num_in, generator=seeded).to(dtype)
    exact = x.double() @ weight.double().T
    assert cpp.takes_linear(x, weight) or cpp.decline(x[None, None]) is not None
    output = backends.linear(x[:, None], weight)[:, 0]
    assert output.dtype == dtype
    torch.testing.assert_close(
        output.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5 * float(exact.abs().max())
    )


def test_linear_leaves_many_rows_to_torch(seeded: torch.Generator) -> None:
    x, weight = torch.randn(2, 7, 40, generator=seeded), torch.randn(30, 40, generator=seeded)
    assert torch.equal(backends.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_outputs_are_the_callers_own(backend: Backend, seeded: torch.Generator) -> None:
    step = backend.bind(make_layer(seeded, Scoring.PAGES, [[90, 90]]))
    outputs = []
    for _ in range(2 * cpp.OUTPUTS + 2):  # allocated several at a time
        query, key = torch.randn(1, 6, 1, 64, generator=seeded), torch.randn(1, 2, 1, 64, generator=seeded)
        outputs.append(step(query, key, key)[0])
    copies = [output.clone() for output in outputs]
    outputs[0].zero_()
    assert all(torch.equal(output, copy) for output, copy in zip(outputs[1:], copies[1:], strict=True))


WITHOUT_MEMORY = """
import resource
from pathlib import Path
import torch
from layers import make_layer
from rocketkv.backends import Scoring, cpp

torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
query, keys = torch.randn(1, 30000, 1, 128, generator=generator), torch.randn(1, 1, 300, 128, generator=generator)
step = cpp.bind(make_layer(generator, Scoring.EXACT, [[200]], group=30000, head_dim=128))
cpp._spare_outputs(tuple(query.shape), query.dtype).append(torch.empty_like(query))
rows = query.reshape(8, -1)
cpp.linear(rows[:, :9], rows[:5, :9].contiguous())  # starts the second thread
calls = {  # with the MB that each may take: less than what its threads, or linear's caller, need in the end
    lambda: cpp.prefill_densely(query, keys, keys, lengths=torch.full((1, 1), 300), scale=0.1): 20,
    lambda: step(query, keys[:, :, :1], keys[:, :, :1])[0]: 54,
    lambda: cpp.linear(rows, rows[:1]): 6,
}
for call, room in calls.items():
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room * 1_000_000, resource.RLIM_INFINITY))
    try:
        call()
    except MemoryError:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(bool(call().isfinite().all()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited in Linux's way")
def test_a_thread_without_memory_is_a_memory_error() -> None:
    # every large block is a mapping of its own, and no thread has a reserve
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, **malloc, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", WITHOUT_MEMORY]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert result.stdout.split() == ["True"] * 3, result.stderr
