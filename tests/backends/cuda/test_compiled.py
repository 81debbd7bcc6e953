"""The CUDA kernels compile for every architecture without a GPU, and need no more of a block than any GPU has."""

import re
import sys
from contextlib import nullcontext
from ctypes import c_void_p
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backends.cuda.emulator import SHARED_BYTES
from layers import SCORINGS, make_layer
from rocketkv.backends import Scoring, Spec, cuda
from rocketkv.backends.cuda.arguments import Layer
from rocketkv.backends.cuda.launch import Kernel, Launch, Program, Shape
from rocketkv.backends.cuda.step import CudaStep

gpu = pytest.importorskip("rocketkv.backends.cuda.gpu", reason="`make setup` installs what compiles CUDA")

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
MOST_LOCAL = 64  # bytes of a thread that may lie in memory for want of registers
NUMBERS = [f"{thing}Dim{axis}" for thing in ("grid", "block") for axis in "XYZ"] + ["sharedMemBytes", "numAttrs"]
REGISTERS = 65536  # of a multiprocessor, which one block at least must fit


class Nowhere:
    """A device of many cores that runs nothing."""

    num_cores = 132
    overlaps = True
    most_cluster = 8

    def load(self, program: Program) -> Kernel:
        return lambda *launch: None


def launches(
    scoring: Scoring, dtype: torch.dtype = torch.bfloat16, group: int = 4, head_dim: int = 128, int8: bool = False
) -> list[Launch]:
    generator = torch.Generator().manual_seed(0)
    layer = make_layer(generator, scoring, [[8]], group=group, head_dim=head_dim, dtype=dtype, int8=int8)
    return CudaStep(layer, Nowhere()).launches


VARIANTS = {  # every architecture has the default; the oldest and the newest have the widest; one has all the rest
    **{arch: launches(Scoring.LOWBIT) for arch in ARCHITECTURES},
    "sm_80 wide": launches(Scoring.LOWBIT, torch.float32, 8, 256),
    "sm_120 wide": launches(Scoring.BOUNDS, torch.float32, 8, 256),
    "sm_90 int8": launches(Scoring.LOWBIT, torch.float16, 8, 128, int8=True),
    **{f"sm_90 {scoring}": launches(scoring)[: 1 if scoring == Scoring.DENSE else 2] for scoring in SCORINGS[:-1]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_compile_fit_and_hardly_spill(variant: str) -> None:
    for launch in VARIANTS[variant]:
        log = StringIO()
        code = gpu.compile_for(launch.program, variant.split()[0], log)
        assert code.startswith(b"\x7fELF")
        remarks = log.getvalue()
        assert "warning" not in remarks
        registers, local, shared = (
            sum(map(int, re.findall(rf"(\d+) {what}", remarks)))
            for what in ("registers", "bytes stack frame", "bytes smem")
        )
        assert 0 < registers * launch.shape.threads <= REGISTERS
        assert local <= MOST_LOCAL
        assert shared + launch.shape.shared_bytes <= SHARED_BYTES


def test_what_was_compiled_is_kept_by_source_options_and_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (program, *_), *_ = launches(Scoring.DENSE)
    first = gpu.compile_for(program, "sm_90")
    (kept,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept.read_bytes() == first
    kept.write_bytes(b"kept")
    assert gpu.compile_for(program, "sm_90") == b"kept"
    assert gpu.compile_for(program, "sm_80") != b"kept"
    assert gpu.compile_for(program._replace(constants=(*program.constants, ("OTHER", 1))), "sm_90") == first


def test_the_driver_gets_the_grid_and_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    results = [*2 * [gpu.driver.CUresult.CUDA_SUCCESS], gpu.driver.CUresult.CUDA_ERROR_INVALID_VALUE]

    def start(config: Any, function: Any, parameters: int, extra: int) -> tuple[Any]:
        layer = Layer.from_address(c_void_p.from_address(parameters).value or 0)
        numbers = {name: getattr(config, name) for name in NUMBERS}
        attributes = {attribute.id: attribute.value for attribute in config.attrs}
        started.append((int(function), numbers, int(config.hStream), attributes, layer.num_units, layer.scale, extra))
        return (results.pop(0),)

    monkeypatch.setattr(gpu.driver, "cuLaunchKernelEx", start)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    kernel = gpu.GpuKernel(SimpleNamespace(handle=5), torch.device("cuda", 0))
    kernel(Layer(num_units=3, scale=0.5), Shape((1, 2, 3), 128, 64))
    assert started == [(5, dict(zip(NUMBERS, (1, 2, 3, 128, 1, 1, 64, 0), strict=True)), 7, {}, 3, 0.5, 0)]
    kernel(Layer(), Shape((1, 2, 3), 128, 64, overlaps=True, cluster=2))
    kinds, values = zip(*started[1][3].items(), strict=True)
    names = ("PROGRAMMATIC_STREAM_SERIALIZATION", "CLUSTER_DIMENSION")
    assert [kind.name for kind in kinds] == [f"CU_LAUNCH_ATTRIBUTE_{name}" for name in names]
    assert values[0].programmaticStreamSerializationAllowed == 1
    assert [getattr(values[1].clusterDim, axis) for axis in "xyz"] == [1, 2, 1]
    with pytest.raises(RuntimeError, match=r"grid \(9, 2, 3\): CUDA_ERROR_INVALID_VALUE"):
        kernel(Layer(), Shape((9, 2, 3), 128, 64))


def test_it_declines_an_older_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda-core before 1.0 keeps no kernels on disk."""
    monkeypatch.delitem(sys.modules, "rocketkv.backends.cuda.gpu")
    monkeypatch.delattr("cuda.core.utils.FileStreamProgramCache")
    cuda._load.cache_clear()
    try:
        reason = cuda.decline(Spec("cuda", torch.float32, 64))
    finally:
        cuda._load.cache_clear()
    assert reason is not None
    assert re.search(r"cannot import name 'FileStreamProgramCache'.*; install rocketkv\[cuda\]", reason)


def test_it_declines_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(name)

    assert cuda.decline(Spec("cpu", torch.float32, 64)) == "it runs on cuda, not on cpu"
    assert cuda.decline(Spec("cuda", torch.float32, 64, "int8")) is None
    assert "head_dim=257" in str(cuda.decline(Spec("cuda", torch.float32, 257)))
    cuda._load.cache_clear()
    monkeypatch.setattr(cuda, "import_module", fail)
    assert "install rocketkv[cuda]" in str(cuda.decline(Spec("cuda", torch.float32, 64)))
    cuda._load.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "compute capability 7.5" in str(cuda.decline(Spec("cuda", torch.float32, 64)))
    cuda._load.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "for AMD's" in str(cuda.decline(Spec("cuda", torch.float32, 64)))
    cuda._load.cache_clear()
