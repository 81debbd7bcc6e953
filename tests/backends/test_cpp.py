"""The C++ kernels' module: its stub, its constants, its linear layers and its output buffers."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
import torch
from nanobind.stubgen import StubGen

from layers import DTYPES, make_layer
from rocketkv import backends
from rocketkv.backends import Backend, Scoring, cpp
from rocketkv.ops import int8, lowbit, pages

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("name", cpp.library_names())
def test_the_kernels_have_the_constants_of_the_reference(name: str) -> None:
    library = vars(import_module(name))
    reference = {**vars(pages), **vars(lowbit), **vars(int8)}
    constants = {key for key in library if key.isupper()}
    assert constants == {"PAGES_PER_BLOCK", "GROUP", "GROUPS_PER_BLOCK", "LEVELS", "STEP_CHANNELS", "NOT_FINITE"}
    assert {key: library[key] for key in constants} == {key: reference[key] for key in constants}
    assert {scoring.name for scoring in library["Scoring"]} == {*Scoring}


@pytest.mark.parametrize("name", cpp.library_names())
def test_the_stub_describes_the_kernels(name: str) -> None:
    library, stub = import_module(name), Path(cpp.__file__).with_name("_kernels.pyi")
    generator = StubGen(library)
    generator.put(library)
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
