"""The commands of `rocketkv bench`: they parse, measure point by point, and report. Help imports no torch."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rocketkv.bench.geometries import Geometry, find_geometry
from rocketkv.bench.report import check_plot, print_json, print_result, save_plot
from rocketkv.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rocketkv.bench.timing import Pace, Row

DTYPES = ("auto", "float32", "bfloat16", "float16")
err = Console(stderr=True, highlight=False)

GeometryName = Annotated[str, typer.Option("--geometry", "-g", help="Sizes of a known model, such as llama-3.1-8b.")]
SeqLens = Annotated[str, typer.Option("--seq-len", help="Tokens of context, separated by commas.")]
TokenBudgets = Annotated[str, typer.Option("--token-budget", "-t", help="Token budgets, separated by commas.")]
Batches = Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: bfloat16, or the model's own.")]
Repeats = Annotated[int, typer.Option(min=0, help="Rounds; 0: until the medians are stable.")]
TimeLimit = Annotated[float, typer.Option(min=0, help="Seconds that a row may take, unless --repeats is given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the result into this file, .png or .svg.")]


def attention(
    geometry: GeometryName = "llama-3.1-8b",
    seq_len: SeqLens = "32768",
    token_budget: TokenBudgets = "512",
    batch: Batches = "1",
    dtype: Dtype = "auto",
    repeats: Repeats = 0,
    time_limit: TimeLimit = 20.0,
    cold_mib: Annotated[int, typer.Option(min=0, help="MiB read before a layer is met again.")] = 256,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Time one layer's decode step: ours, torch's, transformers', and the floor that memory sets."""
    sizes, grid, budgets = _sweep(geometry, seq_len, batch, token_budget)
    check_plot(plot)
    torch_dtype = _torch_dtype(dtype)
    from rocketkv.bench.attention import measure_attention
    from rocketkv.bench.timing import floor_rows

    rows: list[Row] = []
    bandwidth = 0.0
    with _progress("attention", len(grid)) as (on_point, on_round):
        for length, rows_in_batch in grid:
            on_point(f"S={length} batch={rows_in_batch}")
            measured, reached = measure_attention(
                sizes,
                length,
                budgets,
                rows_in_batch,
                torch_dtype,
                pace=_pace(repeats, time_limit),
                cold_bytes=cold_mib * 2**20,
                on_round=on_round,
            )
            rows += measured
            bandwidth = max(bandwidth, reached)
    records = [row.record() for row in [*rows, *floor_rows(rows, bandwidth)]]
    _report("attention", geometry, torch_dtype, records, as_json, plot, bandwidth_gb_per_s=bandwidth / 1e9)


def decode(
    geometry: GeometryName = "llama-3.2-1b",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A real model instead: hub id, folder, GGUF file, smollm2.")
    ] = None,
    seq_len: SeqLens = "32768",
    token_budget: TokenBudgets = "512",
    batch: Batches = "1",
    dtype: Dtype = "auto",
    weights: Annotated[str | None, typer.Option(help="int8 or int4: hold the weights so, on every path.")] = None,
    paths: Annotated[str, typer.Option(help="Ways to run the model: eager, as transformers does; fast, compiled.")] = (
        "eager,fast"
    ),
    repeats: Repeats = 0,
    time_limit: TimeLimit = 30.0,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Time whole decode steps of a transformers model, and say how much of Amdahl's limit is reached."""
    _, grid, budgets = _sweep(geometry, seq_len, batch, token_budget)
    check_plot(plot)
    from rocketkv.bench.decode import PATHS, measure_decode

    chosen = [name.strip() for name in paths.split(",")]
    for name in chosen:
        if name not in PATHS:
            raise InputError(f"--paths {name!r} does not exist; choose from {', '.join(PATHS)}.")
    built = _build(geometry, dtype, weights) if model is None else _load(model, dtype, weights)
    from rocketkv.bench.timing import floor_rows

    rows: list[Row] = []
    comparisons: list[dict[str, object]] = []
    bandwidth = 0.0
    with _progress("decode", len(grid)) as (on_point, on_round):
        for length, rows_in_batch in grid:
            on_point(f"S={length} batch={rows_in_batch}")
            measured, compared, reached = measure_decode(
                built, length, budgets, rows_in_batch, paths=chosen, pace=_pace(repeats, time_limit), on_round=on_round
            )
            rows += measured
            comparisons += compared
            bandwidth = max(bandwidth, reached)
    name = model or geometry
    _report(
        "decode",
        name if weights is None else f"{name} in {weights}",
        built.dtype,
        [row.record() for row in [*rows, *floor_rows(rows, bandwidth)]],
        as_json,
        plot,
        comparisons=comparisons,
        bandwidth_gb_per_s=bandwidth / 1e9,
    )


def prefill(
    geometry: GeometryName = "llama-3.2-1b",
    seq_len: SeqLens = "4096",
    token_budget: TokenBudgets = "512",
    batch: Batches = "1",
    dtype: Dtype = "auto",
    repeats: Repeats = 0,
    time_limit: TimeLimit = 60.0,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Time one layer's prefill attention with compression and without."""
    sizes, grid, budgets = _sweep(geometry, seq_len, batch, token_budget)
    check_plot(plot)
    torch_dtype = _torch_dtype(dtype)
    from rocketkv.bench.prefill import measure_prefill

    rows: list[Row] = []
    with _progress("prefill", len(grid)) as (on_point, on_round):
        for length, rows_in_batch in grid:
            on_point(f"S={length} batch={rows_in_batch}")
            pace = _pace(repeats, time_limit)
            measured = measure_prefill(sizes, length, budgets, rows_in_batch, torch_dtype, pace=pace, on_round=on_round)
            rows += measured
    _report("prefill", geometry, torch_dtype, [row.record() for row in rows], as_json, plot)


def memory(
    geometry: GeometryName = "llama-3.2-1b",
    seq_len: SeqLens = "32768",
    prefill_len: Annotated[
        str, typer.Option(help="Tokens to prefill, separated by commas: these are computed.")
    ] = "4096",
    token_budget: TokenBudgets = "512",
    batch: Batches = "1",
    phases: Annotated[str, typer.Option(help="prefill, decode or both, separated by a comma.")] = "prefill,decode",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Measure peak memory and KV bytes, full and compressed, each in a process of its own."""
    from rocketkv.bench.memory import PHASES, cases, measure_memory

    _, _, budgets = _sweep(geometry, seq_len, batch, token_budget)
    wanted = phases.split(",")
    for phase in wanted:
        if phase not in PHASES:
            raise InputError(f"phases={phases!r} has {phase!r}; choose from {', '.join(PHASES)}.")
    check_plot(plot)
    torch_dtype = _torch_dtype(dtype)
    todo = list(
        cases(
            geometry,
            str(torch_dtype).removeprefix("torch."),
            wanted,
            _numbers("seq-len", seq_len),
            _numbers("prefill-len", prefill_len),
            budgets,
            _numbers("batch", batch),
        )
    )
    rows = []
    with _progress("memory", len(todo)) as (on_point, _):
        for case in todo:
            on_point(f"{case.phase} S={case.seq_len} batch={case.batch}, {case.cache}")
            rows.append(measure_memory(case))
    _report("memory", geometry, torch_dtype, rows, as_json, plot)


COMMANDS: tuple[Callable[..., None], ...] = (attention, decode, prefill, memory)


def _sweep(
    geometry: str, seq_len: str, batch: str, token_budget: str
) -> tuple[Geometry, list[tuple[int, int]], list[int]]:
    """The geometry, every pair of length and batch, and the budgets, checked."""
    sizes = find_geometry(geometry)
    grid = list(product(_numbers("seq-len", seq_len), _numbers("batch", batch)))
    budgets = _numbers("token-budget", token_budget)
    from rocketkv.config import RocketKVConfig

    for budget in budgets:
        RocketKVConfig(token_budget=budget)
    return sizes, grid, budgets


def _numbers(name: str, text: str) -> list[int]:
    """Whole numbers separated by commas, each once."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name}={text!r} is no list of numbers; separate them by commas, as in 128,256.") from None
    if min(numbers) < 1:
        raise InputError(f"{name}={text!r} has a number below 1; give positive ones.")
    return list(dict.fromkeys(numbers))


def _torch_dtype(name: str) -> "torch.dtype":
    """The dtype of this name; auto: bfloat16."""
    if name not in DTYPES:
        raise InputError(f"dtype={name!r} does not exist; choose from {', '.join(DTYPES)}.")
    import torch

    dtype: torch.dtype = getattr(torch, "bfloat16" if name == "auto" else name)
    return dtype


def _pace(repeats: int, time_limit: float) -> "Pace":
    from rocketkv.bench.timing import Pace

    return Pace(repeats, time_limit)


def _build(name: str, dtype: str, weights: str | None) -> "PreTrainedModel":
    """A model of a geometry, behind a spinner."""
    geometry, torch_dtype = find_geometry(name), _torch_dtype(dtype)
    from rocketkv.bench.machine import check_memory
    from rocketkv.bench.model import build_model
    from rocketkv.weights import quantize

    check_memory(f"a model of {name} in {dtype}", geometry.num_parameters * torch_dtype.itemsize)
    with err.status(f"building {name}"):
        model = build_model(geometry, torch_dtype)
        return model if weights is None else quantize(model, weights)


def _load(name: str, dtype: str, weights: str | None) -> "PreTrainedModel":
    """A real model, behind a spinner."""
    from transformers.utils import logging

    from rocketkv.models import load

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with err.status(f"loading {name}"):
        return load(name, dtype, weights).model


@contextmanager
def _progress(title: str, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """A bar over the points of a sweep on standard error, and what tells it of points and rounds."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    task = progress.add_task(title, total=total)
    begun = 0
    point = ""

    def on_point(name: str) -> None:
        nonlocal begun, point
        point = name
        progress.update(task, completed=begun, description=f"{title} {name}")
        begun += 1

    def on_round(number: int) -> None:
        progress.update(task, description=f"{title} {point}, round {number}")

    with progress:
        yield on_point, on_round


def _report(
    benchmark: str,
    model: str,
    dtype: "torch.dtype",
    rows: list[dict[str, object]],
    as_json: bool,
    plot: Path | None,
    **more: Any,
) -> None:
    """Print the result and draw it."""
    from rocketkv.bench.machine import describe_machine, describe_versions

    result: dict[str, Any] = {
        "benchmark": benchmark,
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": describe_machine(),
        "versions": describe_versions(),
        **more,
        "rows": rows,
    }
    if as_json:
        print_json(result)
    else:
        print_result(result)
    if plot is not None:
        save_plot(result, plot)
