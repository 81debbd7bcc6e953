"""The parts of the check. Each is a function of the sizes that yields rows for the record, each once it is measured.

A row with an `error` is of a case that failed; the other cases of a part run nevertheless.
"""

import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_check.run_tests import run_tests
from rocketkv.attention import LayerCache
from rocketkv.backends import BACKENDS, Spec, cuda
from rocketkv.bench.attention import measure_attention
from rocketkv.bench.capacity import measure_capacity
from rocketkv.bench.decode import measure_decode
from rocketkv.bench.geometries import GEOMETRIES, Geometry
from rocketkv.bench.graphs import Replayed
from rocketkv.bench.model import build_model
from rocketkv.bench.prefill import measure_prefill
from rocketkv.bench.tensors import loaded_cache, random_tokens, sparse_config
from rocketkv.bench.timing import Pace, Point
from rocketkv.bench.timing import Row as Measured
from rocketkv.machine import describe_machine, describe_versions

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
        models: the cases of whole models, as in `steps`; transformers' caches take part in the first.
        capacity: tokens of context of the largest batch.
        most_rows: the most rows of the largest batch.
        cold_mib: MiB that are read before a layer is used again.
        repeats: the rounds of each measurement.
        sanitized: the tests that run under compute-sanitizer, as pytest's -k takes them.
        tested: the tests that run without it, likewise; those that compile few kernels (dtype1 is bfloat16).
    """

    device: str
    geometry: Geometry
    steps: tuple[tuple[int, int, int], ...]
    prefills: tuple[int, ...]
    models: tuple[tuple[int, int, int], ...]
    capacity: int
    most_rows: int
    cold_mib: int
    repeats: int
    sanitized: str = "captured and lowbit"
    tested: str = "captured or breaks_off or one_graph or plateaus or (references and dtype1 and (lowbit or dense))"


FULL = Sizes(
    device="cuda",
    geometry=GEOMETRIES["llama-3.1-8b"],
    steps=((32768, 512, 1), (131072, 256, 1), (131072, 512, 1), (131072, 1024, 1), (32768, 512, 8), (16384, 512, 32)),
    prefills=(8192, 32768),
    models=((98304, 256, 1), (98304, 256, 8)),
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
    models=((600, 32, 1),),
    capacity=600,
    most_rows=2,
    cold_mib=1,
    repeats=2,
)

Row = dict[str, Any]
Rows = Iterator[Row]


def machine(sizes: Sizes) -> Rows:
    """Describe the machine, the versions and which backends decode here."""
    yield describe_machine()
    versions: Row = {**describe_versions()}
    for name in ("triton", "cuda-core", "cuda-bindings"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    if sizes.device == "cuda":
        versions |= {"cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability()}
    yield versions
    spec = Spec(sizes.device, torch.bfloat16, sizes.geometry.head_dim)
    yield {f"backend {each.NAME}": each.decline(spec) or "decodes" for each in BACKENDS if sizes.device in each.DEVICES}


def tests(sizes: Sizes) -> Rows:
    """Run quick tests among those that need a GPU, in several processes where pytest can do that."""
    together = [] if find_spec("xdist") is None else ["-n", "8"]
    return run_tests([sys.executable], [TESTS, "-m", "gpu", "-k", sizes.tested, *together])


def sanitizer(sizes: Sizes) -> Rows:
    """Run small tests under compute-sanitizer, if the tool is there."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return iter([{"state": "compute-sanitizer is not installed"}])
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    return run_tests(command, [TESTS, "-m", "gpu", "-k", sizes.sanitized])


def _each(cases: Iterable[tuple[int, int, int]], measure: Callable[[int, int, int], Iterable[Row]]) -> Rows:
    """Yield the rows of each case of context, token budget and batch; of one that fails, a row with the error."""
    for case in cases:
        try:
            yield from measure(*case)
        except Exception as error:  # of whatever kind: the other cases shall be measured
            named = dict(zip(("seq_len", "token_budget", "batch"), case, strict=True))
            yield named | {"error": f"{type(error).__name__}: {error}"[:500]}


def steps(sizes: Sizes) -> Rows:
    """Time one layer's decode step, ours and others', in graphs."""

    def measure(seq_len: int, token_budget: int, batch: int) -> Rows:
        measured, bandwidth = measure_attention(
            sizes.geometry,
            torch.bfloat16,
            Point(seq_len, batch, [token_budget], Pace(sizes.repeats)),
            sizes.cold_mib * MIB,
            selections=("lowbit", "hybrid"),
            device=sizes.device,
        )
        return (row.record() | {"case_budget": token_budget, "bandwidth": bandwidth} for row in measured)

    return _each(sizes.steps, measure)


def kernels(sizes: Sizes) -> Rows:
    """Time each kernel of a low-bit step."""

    def measure(*case: int) -> Rows:
        named = dict(zip(("seq_len", "token_budget", "batch"), case, strict=True))
        times, backend = _kernel_times(sizes, *case)
        return (named | {"backend": backend, "kernel": name, "us": time} for name, time in times.items())

    return _each(sizes.steps, measure)


def _kernel_times(sizes: Sizes, seq_len: int, token_budget: int, batch: int) -> tuple[dict[str, float], str | None]:
    """Return the microseconds of each kernel by torch's profiler, a mean over layers and replays; and the backend."""
    step, caches = _lowbit_step(sizes, seq_len, token_budget, batch)
    activities = torch.profiler.ProfilerActivity
    activity = activities.CUDA if sizes.device == "cuda" else activities.CPU
    with torch.inference_mode():
        step()
        with torch.profiler.profile(activities=[activity]) as profile:
            for _ in range(sizes.repeats):
                step()
    totals = total_times(profile.key_averages(), sizes.device)
    return {name: total / (len(caches) * sizes.repeats) for name, total in totals.items()}, caches[0].backend


def total_times(events: Iterable[Any], device: str) -> dict[str, float]:
    """Return the microseconds of a profiler's events by name: on a GPU those of the device, not the host's calls."""
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type.name == device.upper():
            totals[event.key] += event.device_time_total if device == "cuda" else event.cpu_time_total
    return totals


def launches(sizes: Sizes) -> Rows:
    """Time a low-bit step with and without overlapped launches and clusters, where the CUDA kernels have them."""
    ways, gpu = [(False, 1)], None
    if cuda.decline(Spec(sizes.device, torch.bfloat16, sizes.geometry.head_dim)) is None:
        from rocketkv.backends.cuda.gpu import gpu_of

        gpu = gpu_of(torch.device(sizes.device, torch.cuda.current_device()))
        ways = list(product(sorted({gpu.overlaps, False}), sorted({gpu.most_cluster, 1})))

    def measure(*case: int) -> Rows:
        for overlaps, most_cluster in ways:
            if gpu is not None:
                gpu.overlaps, gpu.most_cluster = overlaps, most_cluster
            step, caches = _lowbit_step(sizes, *case)
            with torch.inference_mode():
                step()
                us = 1000 * median(step() for _ in range(sizes.repeats)) / len(caches)
            name = f"{'overlapped' if overlaps else 'one by one'}, clusters of at most {most_cluster}"
            named = dict(zip(("seq_len", "token_budget", "batch"), case, strict=True))
            yield named | {"backend": caches[0].backend, "kernel": name, "us": us}

    return _each(dict.fromkeys((sizes.steps[0], sizes.steps[-1])), measure)


def _lowbit_step(sizes: Sizes, seq_len: int, token_budget: int, batch: int) -> tuple[Replayed, list[LayerCache]]:
    """Return a low-bit step in each of several layers, and the layers."""
    geometry, num_layers = sizes.geometry, 8 if sizes.device == "cuda" else 1
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": sizes.device}
    tokens = random_tokens(batch, geometry.num_kv_heads, seq_len, geometry.head_dim, **options)
    config = sparse_config(token_budget)
    caches = [loaded_cache(config, tokens, tokens, seq_len) for _ in range(num_layers)]
    query = torch.randn(batch, geometry.num_heads, 1, geometry.head_dim, **options)
    key = torch.randn(batch, geometry.num_kv_heads, 1, geometry.head_dim, **options)
    step = Replayed(lambda: torch.cat([cache.decode(query, key, key) for cache in caches]), caches, sizes.device)
    return step, caches


def prefills(sizes: Sizes) -> Rows:
    """Time the prefill of one layer, and what stage 1 and the index add."""

    def measure(seq_len: int, token_budget: int, batch: int) -> Rows:
        point = Point(seq_len, batch, [token_budget], Pace(sizes.repeats))
        return _records(measure_prefill(sizes.geometry, torch.bfloat16, point, device=sizes.device))

    return _each([(seq_len, sizes.steps[0][1], 1) for seq_len in sizes.prefills], measure)


def models(sizes: Sizes) -> Rows:
    """Time whole decode steps of a model with random weights, in graphs; and find the largest batches that fit.

    The model is compiled once for all of this.
    """
    model = build_model(sizes.geometry, torch.bfloat16, sizes.device)

    def point(seq_len: int, token_budget: int, batch: int) -> Point:
        return Point(seq_len, batch, [token_budget], Pace(sizes.repeats))

    def ours(*case: int) -> Rows:
        return _records(measure_decode(model, point(*case), ["fast"], names=("rest", "rocketkv", "dense"))[0])

    def others(*case: int) -> Rows:
        return _records(measure_decode(model, point(*case), ["fast"], names=("full", "static"))[0])

    def largest(*case: int) -> Rows:
        for row in _records(measure_capacity(model, point(*case), None, sizes.most_rows)):
            yield row | {"name": f"largest batch, {row['name']}"}

    yield from _each(sizes.models, ours)
    yield from _each([(sizes.capacity, sizes.models[0][1], 1)], largest)
    yield from _each(sizes.models[:1], others)


def _records(rows: Iterable[Measured]) -> Rows:
    return (row.record() for row in rows)


# In the order in which they run, with the seconds that each may take beside those that earlier ones leave.
PARTS: dict[str, tuple[Callable[[Sizes], Rows], int]] = {
    "machine": (machine, 15),
    "steps": (steps, 40),
    "kernels": (kernels, 20),
    "launches": (launches, 20),
    "prefills": (prefills, 20),
    "models": (models, 90),
    "sanitizer": (sanitizer, 25),
    "tests": (tests, 60),
}
