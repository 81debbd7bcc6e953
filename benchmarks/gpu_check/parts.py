"""The parts of the check. Each is a function of the sizes that returns rows for the record."""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rocketkv.backends import Spec, cuda
from rocketkv.bench.attention import measure_attention
from rocketkv.bench.capacity import measure_capacity
from rocketkv.bench.decode import measure_decode
from rocketkv.bench.geometries import GEOMETRIES, Geometry
from rocketkv.bench.graphs import Replayed
from rocketkv.bench.model import build_model
from rocketkv.bench.prefill import measure_prefill
from rocketkv.bench.tensors import loaded_cache, random_tokens, sparse_config
from rocketkv.bench.timing import Pace, Point
from rocketkv.machine import describe_machine, describe_versions

ROOT = Path(__file__).parents[2]
TESTS = "tests/backends/test_gpu.py"
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """How much each part does.

    Attributes:
        device: `cuda` or `cpu`.
        geometry: the sizes of the model.
        steps: the cases of a layer's decode step: tokens of context, token budget, batch.
        prefills: the lengths of prompts.
        models: the cases of whole models: tokens of context, batch.
        capacity: tokens of context of the largest batch.
        most_rows: the most rows of the largest batch.
        cold_mib: MiB that are read before a layer is used again.
        repeats: the rounds of each measurement.
        sanitized: the tests that run under compute-sanitizer, as pytest's -k takes them.
    """

    device: str
    geometry: Geometry
    steps: tuple[tuple[int, int, int], ...]
    prefills: tuple[int, ...]
    models: tuple[tuple[int, int], ...]
    capacity: int
    most_rows: int
    cold_mib: int
    repeats: int
    sanitized: str = "captured"


FULL = Sizes(
    device="cuda",
    geometry=GEOMETRIES["llama-3.1-8b"],
    steps=((32768, 512, 1), (131072, 256, 1), (131072, 512, 1), (131072, 1024, 1), (32768, 512, 8), (16384, 512, 32)),
    prefills=(8192, 32768),
    models=((16384, 1), (98304, 1), (32768, 8)),
    capacity=98304,
    most_rows=256,
    cold_mib=256,
    repeats=10,
)
TINY = Sizes(
    device="cpu",
    geometry=Geometry("tiny", "llama", 2, 64, 4, 2, 32, 96, 128, True),
    steps=((600, 64, 1),),
    prefills=(128,),
    models=((600, 1),),
    capacity=600,
    most_rows=2,
    cold_mib=1,
    repeats=2,
)

Rows = list[dict[str, Any]]


def machine(sizes: Sizes) -> Rows:
    """Describe the machine and the versions."""
    versions: dict[str, Any] = {**describe_versions()}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError as error:
        versions["triton"] = str(error)
    if sizes.device == "cuda":
        versions |= {"cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability()}
    return [describe_machine(), versions]


def tests(sizes: Sizes) -> Rows:
    """Run the tests that need a GPU."""
    return [_pytest([sys.executable], [TESTS, "-m", "gpu"])]


def sanitizer(sizes: Sizes) -> Rows:
    """Run small tests under compute-sanitizer, if the tool is there."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [{"state": "compute-sanitizer is not installed"}]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    return [_pytest(command, [TESTS, "-m", "gpu", "-k", sizes.sanitized])]


def steps(sizes: Sizes) -> Rows:
    """Time one layer's decode step, ours and others', in graphs."""
    rows: Rows = []
    for seq_len, token_budget, batch in sizes.steps:
        point = Point(seq_len, batch, [token_budget], Pace(sizes.repeats))
        measured, bandwidth = measure_attention(
            sizes.geometry,
            torch.bfloat16,
            point,
            sizes.cold_mib * MIB,
            selections=("lowbit", "hybrid"),
            device=sizes.device,
        )
        rows += [row.record() | {"case_budget": token_budget, "bandwidth": bandwidth} for row in measured]
    return rows


def kernels(sizes: Sizes) -> Rows:
    """Time each kernel of a low-bit step."""
    rows: Rows = []
    for case in sizes.steps:
        named = dict(zip(("seq_len", "token_budget", "batch"), case, strict=True))
        rows += [named | {"kernel": name, "us": time} for name, time in _kernel_times(sizes, *case).items()]
    return rows


def _kernel_times(sizes: Sizes, seq_len: int, token_budget: int, batch: int) -> dict[str, float]:
    """Return the microseconds of each kernel by torch's profiler, as the mean over the layers and replays."""
    step, num_layers = _lowbit_step(sizes, seq_len, token_budget, batch)
    activities = torch.profiler.ProfilerActivity
    activity = activities.CUDA if sizes.device == "cuda" else activities.CPU
    with torch.inference_mode():
        step()
        with torch.profiler.profile(activities=[activity]) as profile:
            for _ in range(sizes.repeats):
                step()
    times: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        total = getattr(event, "device_time_total", 0.0) or getattr(event, "cpu_time_total", 0.0)
        times[event.key] += total / (num_layers * sizes.repeats)
    return times


def launches(sizes: Sizes) -> Rows:
    """Time a low-bit step with and without overlapped launches and clusters, where the CUDA kernels have them."""
    ways, gpu = [(False, 1)], None
    if cuda.decline(Spec(sizes.device, torch.bfloat16, sizes.geometry.head_dim)) is None:
        from rocketkv.backends.cuda.gpu import gpu_of

        gpu = gpu_of(torch.device(sizes.device, torch.cuda.current_device()))
        ways = list(product(sorted({gpu.overlaps, False}), sorted({gpu.most_cluster, 1})))
    rows: Rows = []
    for case in dict.fromkeys((sizes.steps[0], sizes.steps[-1])):
        for overlaps, most_cluster in ways:
            if gpu is not None:
                gpu.overlaps, gpu.most_cluster = overlaps, most_cluster
            step, num_layers = _lowbit_step(sizes, *case)
            with torch.inference_mode():
                step()
                us = 1000 * median(step() for _ in range(sizes.repeats)) / num_layers
            name = f"{'overlapped' if overlaps else 'one by one'}, clusters of at most {most_cluster}"
            rows.append(dict(zip(("seq_len", "token_budget", "batch"), case, strict=True)) | {"kernel": name, "us": us})
    return rows


def _lowbit_step(sizes: Sizes, seq_len: int, token_budget: int, batch: int) -> tuple[Replayed, int]:
    """Return a low-bit step in each of several layers, and the number of layers."""
    geometry, num_layers = sizes.geometry, 8 if sizes.device == "cuda" else 1
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": sizes.device}
    tokens = random_tokens(batch, geometry.num_kv_heads, seq_len, geometry.head_dim, **options)
    config = sparse_config(token_budget)
    caches = [loaded_cache(config, tokens, tokens, seq_len) for _ in range(num_layers)]
    query = torch.randn(batch, geometry.num_heads, 1, geometry.head_dim, **options)
    key = torch.randn(batch, geometry.num_kv_heads, 1, geometry.head_dim, **options)
    step = Replayed(lambda: torch.cat([cache.decode(query, key, key) for cache in caches]), caches, sizes.device)
    return step, num_layers


def prefills(sizes: Sizes) -> Rows:
    """Time the prefill of one layer, and what stage 1 and the index add."""
    rows: Rows = []
    for seq_len in sizes.prefills:
        point = Point(seq_len, 1, [sizes.steps[0][1]], Pace(sizes.repeats))
        rows += [row.record() for row in measure_prefill(sizes.geometry, torch.bfloat16, point, device=sizes.device)]
    return rows


def models(sizes: Sizes) -> Rows:
    """Time whole decode steps of a compiled model with random weights, in graphs."""
    model, rows = build_model(sizes.geometry, torch.bfloat16, sizes.device), []
    for seq_len, batch in sizes.models:
        point = Point(seq_len, batch, [sizes.steps[0][1] // 2], Pace(sizes.repeats))
        rows += [row.record() for row in measure_decode(model, point, ["fast"])[0]]
    return rows


def capacity(sizes: Sizes) -> Rows:
    """Find the largest batch that fits, and its tokens per second."""
    model = build_model(sizes.geometry, torch.bfloat16, sizes.device)
    point = Point(sizes.capacity, 1, [sizes.steps[0][1] // 2], Pace(sizes.repeats))
    return [row.record() for row in measure_capacity(model, point, None, sizes.most_rows)]


# In the order in which they run, with the most seconds that each may take.
PARTS: dict[str, tuple[Callable[[Sizes], Rows], int]] = {
    "machine": (machine, 30),
    "tests": (tests, 90),
    "steps": (steps, 60),
    "kernels": (kernels, 40),
    "launches": (launches, 40),
    "models": (models, 90),
    "capacity": (capacity, 60),
    "prefills": (prefills, 30),
    "sanitizer": (sanitizer, 60),
}


def _pytest(command: list[str], arguments: list[str]) -> dict[str, Any]:
    """Run pytest in a process of its own; return how many tests passed, and which failed."""
    # Nothing is built, and another torch may deprecate what this one does not; the suite takes warnings for errors.
    expected = ("ignore:on this CPU rocketkv:RuntimeWarning", "default::DeprecationWarning", "default::FutureWarning")
    tolerant = [argument for warning in expected for argument in ("-W", warning)]
    command = [*command, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *tolerant, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", result.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    return {
        "status": result.returncode,
        **counts,
        "failures": failed,
        "output": (result.stdout + result.stderr)[-2000:],
    }
