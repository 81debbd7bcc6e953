"""The commands of `rocketkv bench` that time something at many sizes, point by point, and what all of them share."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rocketkv.bench.geometries import find_geometry
from rocketkv.bench.output import print_json, print_result
from rocketkv.bench.plot import check_plot, save_plot
from rocketkv.bench.timing import Pace, Point, Row, floor_rows
from rocketkv.commands.options import AsJson, WeightDtype, numbers
from rocketkv.commands.terminal import counted, err, load_model
from rocketkv.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GeometryName = Annotated[str, typer.Option("--geometry", "-g", help="Sizes of a known model, such as llama-3.1-8b.")]
SeqLens = Annotated[str, typer.Option("--seq-len", help="Numbers of tokens of context, separated by commas.")]
TokenBudgets = Annotated[str, typer.Option("--token-budget", "-t", help="Token budgets, separated by commas.")]
Batches = Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto is bfloat16, or the model's own.")]
Repeats = Annotated[int, typer.Option(min=0, help="Number of rounds; 0 measures until the medians are stable.")]
TimeLimit = Annotated[float, typer.Option(min=0, help="Seconds that a row may take, unless --repeats is given.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda for a GPU, which is timed by its own events.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the result into this file, .png or .svg.")]


@dataclass(frozen=True)
class Sweep:
    """The sizes that a benchmark goes through, and where its result goes."""

    geometry: GeometryName = "llama-3.2-1b"
    seq_len: SeqLens = "32768"
    token_budget: TokenBudgets = "512"
    batch: Batches = "1"
    dtype: Dtype = "auto"
    as_json: AsJson = False
    plot: Plot = None

    @property
    def torch_dtype(self) -> "torch.dtype":
        """Return the dtype of that name; auto stands for bfloat16."""
        import torch

        from rocketkv.hf.models import find_dtype

        dtype: torch.dtype = find_dtype(self.dtype, torch.bfloat16)
        return dtype

    def axes(self) -> tuple[list[int], list[int], list[int]]:
        """Return lengths, batches and budgets, after every check that is possible before anything is measured."""
        find_geometry(self.geometry)
        check_plot(self.plot)
        lengths, batches = numbers("seq-len", self.seq_len), numbers("batch", self.batch)
        budgets = numbers("token-budget", self.token_budget)
        from rocketkv.config import RocketKVConfig

        if min(budgets) < RocketKVConfig.window_size:
            raise InputError(
                f"token_budget={min(budgets)} is smaller than window_size={RocketKVConfig.window_size}, which every "
                "benchmark has; give a larger --token-budget."
            )
        return lengths, batches, budgets

    def report(self, benchmark: str, rows: list[dict[str, object]], **more: Any) -> None:
        """Print the result and draw it."""
        from rocketkv.machine import describe_machine, describe_versions

        result: dict[str, Any] = {
            "benchmark": benchmark,
            "model": self.geometry,
            "dtype": str(self.torch_dtype).removeprefix("torch."),
            "machine": describe_machine(),
            "versions": describe_versions(),
            **more,
            "rows": rows,
        }
        if self.as_json:
            print_json(result)
        else:
            print_result(result)
        if self.plot is not None:
            save_plot(result, self.plot)


@dataclass(frozen=True)
class TimedSweep(Sweep):
    """A sweep, and how long each of its points may take."""

    repeats: Repeats = 0
    time_limit: TimeLimit = 30.0
    device: Device = "cpu"

    def points(self) -> list[Point]:
        """Return a point for every length with every batch."""
        from rocketkv.bench.device import check_device

        lengths, batches, budgets = self.axes()
        check_device(self.device)
        pace = Pace(self.repeats, self.time_limit)
        return [Point(length, batch, budgets, pace) for length, batch in product(lengths, batches)]


def attention(
    sweep: TimedSweep = TimedSweep(geometry="llama-3.1-8b", time_limit=20.0),
    cold_mib: Annotated[int, typer.Option(min=0, help="MiB that are read before a layer is used again.")] = 256,
    selection: Annotated[
        str | None,
        typer.Option(help="Selection methods, separated by commas, instead of the default; lowbit:int8 with 8 bits."),
    ] = None,
) -> None:
    """Time one layer's decode step with our attention, torch's and transformers', beside the floor that memory sets."""
    todo, geometry, dtype = sweep.points(), find_geometry(sweep.geometry), sweep.torch_dtype
    from rocketkv.bench.attention import measure_attention
    from rocketkv.bench.tensors import sparse_config
    from rocketkv.config import DEFAULT_SELECTION

    names = (selection or DEFAULT_SELECTION).split(",")
    selections = list(dict.fromkeys(name.strip() for name in names))
    for name in selections:
        sparse_config(min(todo[0].token_budgets), name)  # this refuses an unknown name
    rows: list[Row] = []
    bandwidths: list[float] = []
    with counted("attention", todo) as points:
        for point, on_round in points:
            measured, reached = measure_attention(
                geometry, dtype, point, cold_mib * 2**20, on_round, selections=selections, device=sweep.device
            )
            rows += [*measured, *floor_rows(measured, reached)]
            bandwidths.append(reached)
    records = [row.record() for row in rows]
    sweep.report("attention", records, device=sweep.device, bandwidth_gb_per_s=median(bandwidths) / 1e9)


def decode(
    sweep: TimedSweep = TimedSweep(),
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A real model instead: hub id, folder, GGUF file, smollm2.")
    ] = None,
    weight_dtype: WeightDtype = None,
    paths: Annotated[
        str, typer.Option(help="Ways to run the model: eager runs it as transformers does, fast compiles it.")
    ] = ("eager,fast"),
) -> None:
    """Time whole decode steps of a transformers model, and say how much of Amdahl's limit is reached."""
    todo = sweep.points()
    if weight_dtype is not None and sweep.device != "cpu":
        raise InputError(f"--weight-dtype {weight_dtype} works on the CPU, not on {sweep.device}; leave it out.")
    from rocketkv.bench.decode import PATHS, measure_decode

    chosen = [name.strip() for name in paths.split(",")]
    for name in chosen:
        if name not in PATHS:
            raise InputError(f"--paths {name!r} does not exist; choose from {', '.join(PATHS)}.")
    built = (
        _build(sweep, weight_dtype)
        if model is None
        else load_model(model, sweep.dtype, weight_dtype).model.to(sweep.device)
    )
    rows: list[Row] = []
    comparisons: list[dict[str, object]] = []
    bandwidths: list[float] = []
    with counted("decode", todo) as points:
        for point, on_round in points:
            measured, compared, reached = measure_decode(built, point, chosen, on_round)
            rows += [*measured, *floor_rows(measured, reached)]
            comparisons += compared
            bandwidths.append(reached)
    name = model or sweep.geometry
    sweep.report(
        "decode",
        [row.record() for row in rows],
        model=name if weight_dtype is None else f"{name} in {weight_dtype}",
        dtype=str(built.dtype).removeprefix("torch."),
        device=sweep.device,
        comparisons=comparisons,
        bandwidth_gb_per_s=median(bandwidths) / 1e9,
    )


def prefill(
    sweep: TimedSweep = TimedSweep(seq_len="4096", time_limit=60.0),
    whole_model: Annotated[
        bool, typer.Option("--whole-model", help="Time a whole model of these sizes instead, with random weights.")
    ] = False,
) -> None:
    """Time the attention of a prompt in one layer, ours and torch's, and what compression adds; or a whole model's."""
    todo, geometry, dtype = sweep.points(), find_geometry(sweep.geometry), sweep.torch_dtype
    from rocketkv.bench.prefill import measure_model_prefill, measure_prefill

    model = _build(sweep, None) if whole_model else None
    rows: list[Row] = []
    with counted("prefill", todo) as points:
        for point, on_round in points:
            if model is None:
                rows += measure_prefill(geometry, dtype, point, on_round, device=sweep.device)
            else:
                rows += measure_model_prefill(model, point, on_round)
    sweep.report("prefill", [row.record() for row in rows], device=sweep.device)


def capacity(
    sweep: TimedSweep = TimedSweep(),
    memory_gib: Annotated[
        float | None, typer.Option(min=0, help="GiB for weights and caches. Default: all that is available.")
    ] = None,
    most_rows: Annotated[int, typer.Option(min=1, help="The largest batch to try.")] = 256,
) -> None:
    """Find the largest batch that fits in a memory, dense and compressed, and its tokens per second; no --batch."""
    todo = sweep.points()
    if sweep.batch != TimedSweep.batch:
        raise InputError(f"--batch {sweep.batch} has no effect here, where the memory decides; leave it out.")
    from rocketkv.bench.capacity import measure_capacity

    model = _build(sweep, None)
    memory_bytes = None if memory_gib is None else int(memory_gib * 2**30)
    rows: list[Row] = []
    with counted("capacity", todo) as points:
        for point, on_round in points:
            rows += measure_capacity(model, point, memory_bytes, most_rows, on_round)
    sweep.report("capacity", [row.record() for row in rows], device=sweep.device, memory_gib=memory_gib)


def _build(sweep: TimedSweep, weight_dtype: str | None) -> "PreTrainedModel":
    """Return a model of the geometry, and show a spinner while it is built."""
    geometry, dtype = find_geometry(sweep.geometry), sweep.torch_dtype
    from rocketkv.bench.device import check_memory
    from rocketkv.bench.model import build_model
    from rocketkv.hf.weights import quantize

    what = f"a model of {geometry.name} in {sweep.dtype}"
    check_memory(what, geometry.num_parameters * dtype.itemsize, sweep.device)
    with err.status(f"building {geometry.name}"):
        model = build_model(geometry, dtype, sweep.device)
        return model if weight_dtype is None else quantize(model, weight_dtype)
