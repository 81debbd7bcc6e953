"""Tests of the Triton kernels' machine code, without a GPU: they compile, fit and do not spill registers."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from layers import make_layer
from rocketkv.backends import triton
from rocketkv.backends.triton.launch import Launch
from rocketkv.index import LowBitIndex, PageIndex
from rocketkv.ops import NO_TERMS, LogitTerms

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
    torch.int8: "i8",
}
TARGETS = {  # and the shared memory of a program there, in KiB
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}


MANY = 160  # rows with work for so many programs that one with low-bit keys has one warp
BOTH_TERMS = LogitTerms(torch.zeros(8), 50.0)
KERNELS = (  # of a prefill
    "build_lowbit",
    "sum_lowbit_spread",
    "build_pages",
    "sum_page_spread",
    "sum_window",
    "score_window",
)


def source_of(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """Return a kernel specialised for these arguments: aligned pointers to whole cache lines, and any sizes."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = "*" + NAMES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(kernel, signature, constants, attributes)


# Every target has the default; AMD's has all the rest, and each of the rest one of NVIDIA's.
CASES: list[tuple[Any, ...]] = [
    ("lowbit", torch.bfloat16, 128, False, False, NO_TERMS, 1, ("sm_80", "sm_90", "sm_100")),
    *((scoring, torch.bfloat16, 128, False, False, NO_TERMS, 1, ("sm_90",)) for scoring in triton.SCORINGS[:-1]),
    ("pages", torch.float32, 256, True, False, NO_TERMS, 1, ("sm_100",)),  # the widest
    ("lowbit", torch.float32, 256, True, False, NO_TERMS, 1, ("sm_80",)),
    ("lowbit", torch.bfloat16, 128, False, True, NO_TERMS, MANY, ("sm_80",)),
    ("lowbit", torch.bfloat16, 256, True, True, NO_TERMS, 1, ("sm_90",)),
    ("lowbit", torch.bfloat16, 128, False, False, BOTH_TERMS, 1, ("sm_100",)),
]


@pytest.mark.parametrize(
    ("scoring", "dtype", "head_dim", "archived", "int8", "terms", "rows", "target"),
    [(*case, target) for *case, targets in CASES for target in (*targets, "gfx942")],
)
def test_kernels_compile_fit_and_do_not_spill(
    seeded: torch.Generator,
    scoring: str,
    dtype: torch.dtype,
    head_dim: int,
    archived: bool,
    int8: bool,
    terms: LogitTerms,
    rows: int,
    target: str,
) -> None:
    options = {"group": 4, "head_dim": head_dim, "dtype": dtype, "archived": archived, "int8": int8, "terms": terms}
    small = make_layer(seeded, scoring, [[8, 8]] * rows, **options)
    step = triton.bind(replace(small, top_k=torch.tensor([256])))
    assert step.launches[0].options["num_warps"] == (1 if rows == MANY else 8 if terms.softcap else 4)
    x = torch.empty(0, dtype=dtype)
    token = {"query": x, "key": x, "value": x, "output": x, "report": None}
    for launch in step.launches:
        check(source_of(launch.kernel, launch.arguments | token), launch.options, target)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "terms", "target"),
    [
        (torch.bfloat16, 128, BOTH_TERMS, "sm_90"),
        (torch.bfloat16, 128, BOTH_TERMS, "gfx942"),
        (torch.float32, 256, NO_TERMS, "sm_80"),
        (torch.float32, 256, NO_TERMS, "sm_100"),
        (torch.float32, 256, NO_TERMS, "gfx942"),
    ],
)
def test_kernels_of_a_prefill_compile_too(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, terms: LogitTerms, target: str
) -> None:
    launches: list[Launch] = []
    monkeypatch.setattr(Launch, "__call__", lambda self: launches.append(self))
    keys, lengths = torch.zeros(1, 2, 100, head_dim, dtype=dtype), torch.full((1, 2), 100)
    triton.build_lowbit(LowBitIndex(keys, lengths).stored, keys, lengths)
    page_size = torch.tensor([3])
    triton.build_pages(PageIndex(keys, lengths, page_size, weighted=True).stored, keys, lengths)
    query, num_queries = torch.zeros(1, 8, 32, head_dim, dtype=dtype), torch.tensor([32])
    triton.score_window(query, keys, lengths=lengths, num_queries=num_queries, scale=0.1, by_peak=False, terms=terms)
    assert sorted(launch.kernel.fn.__name__.removesuffix("_kernel") for launch in launches) == sorted(KERNELS)
    for launch in launches:
        check(source_of(launch.kernel, launch.arguments), launch.options, target)


def check(source: ASTSource, options: dict[str, Any], target: str) -> None:
    """Compile a kernel, and check that it fits and does not spill registers."""
    gpu, shared_kib = TARGETS[target]
    compiled = compile(source, target=gpu, options=options)
    assert compiled.metadata.shared <= shared_kib * 1024
    if gpu.backend == "cuda":
        code = compiled.asm["sass"]
        assert "EXIT" in code
        assert not re.findall(r"\b(STL|LDL)\b.*", code), f"{compiled.metadata.name} spills"
    else:
        spills = dict(re.findall(r"\.([sv]gpr_spill_count): +(\d+)", compiled.asm["amdgcn"]))
        assert spills == {"sgpr_spill_count": "0", "vgpr_spill_count": "0"}, compiled.metadata.name
