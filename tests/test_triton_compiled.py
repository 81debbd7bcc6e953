"""The Triton kernels as machine code, which needs no GPU: they compile, fit and keep their numbers in registers."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from layers import make_layer
from rocketkv.ops.backends import triton

kernels = triton._load()
if isinstance(kernels, str) or kernels.INTERPRETED:
    pytest.skip(
        f"{kernels if isinstance(kernels, str) else 'the interpreter compiles nothing'}; `make test-triton` compiles",
        allow_module_level=True,
    )

from triton.backends.compiler import GPUTarget  # noqa: E402  # only there if the kernels are
from triton.compiler import ASTSource, compile  # noqa: E402

NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
TARGETS = {  # and the shared memory of a program there, in KiB
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}


def source_of(launch: triton.Launch, token: dict[str, torch.Tensor | None]) -> ASTSource:
    """A kernel as it is specialised for these arguments: whole cache lines behind every pointer, any sizes."""
    signature, constants, attributes = {}, {}, {}
    arguments: dict[str, Any] = launch.arguments | token
    for i, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = "*" + NAMES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(launch.kernel, signature, constants, attributes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("scoring", "dtype", "head_dim", "archived"),
    [
        *((scoring, torch.bfloat16, 128, False) for scoring in triton.scorings()),
        *((scoring, torch.float32, 256, True) for scoring in ("hybrid", "lowbit")),  # the widest
    ],
)
def test_kernels_compile_fit_and_do_not_spill(
    seeded: torch.Generator, scoring: str, dtype: torch.dtype, head_dim: int, archived: bool, target: str
) -> None:
    small = make_layer(seeded, scoring, [[8, 8]], group=4, head_dim=head_dim, dtype=dtype, archived=archived)
    step = triton.bind(replace(small, top_k=torch.tensor([256])))
    x = torch.empty(0, dtype=dtype)
    token = {"query": x, "key": x, "value": x, "output": x, "report": None}
    gpu, shared_kib = TARGETS[target]
    for launch in step.launches:
        compiled = compile(source_of(launch, token), target=gpu, options=launch.options)
        assert compiled.metadata.shared <= shared_kib * 1024
        if gpu.backend == "cuda":
            code = compiled.asm["sass"]
            assert "EXIT" in code
            assert not re.findall(r"\b(STL|LDL)\b.*", code), f"{compiled.metadata.name} spills"
        else:
            spills = dict(re.findall(r"\.([sv]gpr_spill_count): +(\d+)", compiled.asm["amdgcn"]))
            assert spills == {"sgpr_spill_count": "0", "vgpr_spill_count": "0"}, compiled.metadata.name
