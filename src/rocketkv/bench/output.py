"""Results for people and for programs: a table, one JSON object."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rocketkv.bench.timing import floor_of

Record = Mapping[str, Any]

AXES = {"seq_len": "tokens", "token_budget": "token budget", "batch": "batch"}

OTHERS = (  # they share our dense attention's floor
    "sdpa_grouped",
    "sdpa_gqa",
    "flash_attn",
    "flashinfer",
    "transformers_default",
    "transformers_static",
    "full",
    "static",
)

out = Console(highlight=False)


def print_json(result: Record) -> None:
    """Print one JSON object and nothing else."""
    print(json.dumps(result, indent=2))


def print_result(result: Record) -> None:
    """Print a table, and below it what the figures depend on."""
    rows: Sequence[Record] = result["rows"]
    fixed = [f"{AXES[name]} {distinct(rows, name).pop()}" for name in AXES if len(distinct(rows, name)) == 1]
    title = ", ".join([f"{result['benchmark']}: {result['model']}", result["dtype"], *fixed])
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    is_memory = result["benchmark"] == "memory"
    columns = _axis_columns(rows) | (_memory_columns() if is_memory else _time_columns(rows))
    for name in columns:
        table.add_column(name, justify="left" if name in ("what", "path") else "right", no_wrap=True)
    for row in rows:
        if row["name"].endswith("_floor"):  # floors have a column of their own
            continue
        table.add_row(*(render(row) for render in columns.values()))
    out.print(table)
    for line in result.get("comparisons", ()):
        out.print(
            f"S={line['seq_len']} t={line['token_budget']} batch={line['batch']} {line['path']}: "
            f"{line['achieved_factor']:.2f} x as fast as {line['baseline']}; at best "
            f"{line['amdahl_factor']:.2f} x ({line['share_percent']:.0f}% reached)",
            soft_wrap=True,
        )
    if any(row.get("interleaved") is False for row in rows):
        out.print("Not all caches fitted in memory at once, so they were measured one after the other.")
    repeats = {row["repeats"] for row in rows if row.get("repeats", 1) > 1}
    if repeats:
        out.print(f"medians of {' to '.join(map(str, sorted({min(repeats), max(repeats)})))} repeats", style="dim")
    machine, versions = result["machine"], result["versions"]
    text = (
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
    )
    if result.get("device", "cpu") != "cpu":
        text = str(machine["accelerator"])
    if "bandwidth_gb_per_s" in result:
        text += f", reads {result['bandwidth_gb_per_s']:.1f} GB/s"
    out.print(text, style="dim", soft_wrap=True)
    out.print(
        ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in versions.items()), style="dim", soft_wrap=True
    )


def _axis_columns(rows: Sequence[Record]) -> dict[str, Any]:
    """Return the columns of the sizes that were swept; the title has those that were not."""
    columns: dict[str, Any] = {
        "tokens": ("seq_len", lambda row: str(row["seq_len"])),
        "t": ("token_budget", lambda row: str(row["token_budget"] or "")),
        "batch": ("batch", lambda row: str(row["batch"])),
    }
    return {name: render for name, (axis, render) in columns.items() if len(distinct(rows, axis)) > 1}


def _time_columns(rows: Sequence[Record]) -> dict[str, Any]:
    floors = {
        (row["name"], row["seq_len"], row["batch"], row["token_budget"]): row["median_ms"]
        for row in rows
        if row["name"].endswith("_floor")
    }

    num_paths = len({row["path"] for row in rows if "path" in row})

    def floor_ms(row: Record) -> float:
        floor = "dense_floor" if row["name"] in OTHERS else floor_of(row["name"])
        return float(floors.get((floor, row["seq_len"], row["batch"], row["token_budget"]), 0.0))

    columns: dict[str, Any] = {
        "what": lambda row: row["name"],
        "path": lambda row: row.get("path", "") if num_paths > 1 else "",
        "ms": lambda row: _digits(row["median_ms"]),
        "min-max": lambda row: f"{_digits(row['min_ms'])}-{_digits(row['max_ms'])}",
        "MiB": lambda row: _digits(row["bytes"] / 2**20),
        "floor ms": lambda row: _digits(floor_ms(row)) if floor_ms(row) else "",
        "x floor": lambda row: _digits(row["median_ms"] / floor_ms(row)) if floor_ms(row) else "",
        "tok/s": lambda row: _digits(row["tokens_per_second"]) if "tokens_per_second" in row else "",
        "GFLOP/s": lambda row: _digits(row["gflop_per_s"]) if "gflop_per_s" in row else "",
        "overhead": lambda row: f"{row['overhead_percent']:+.1f}%" if "overhead_percent" in row else "",
    }
    return {
        name: render
        for name, render in columns.items()
        if name not in ("path", "floor ms", "x floor", "tok/s", "GFLOP/s", "overhead")
        or any(render(row) for row in rows)
    }


def _memory_columns() -> dict[str, Any]:
    return {
        "what": lambda row: row["name"],
        "KV MiB": lambda row: f"{row['kv_bytes'] / 2**20:.1f}",
        "peak MiB": lambda row: f"{row['peak_rss_bytes'] / 2**20:.0f}",
        "before the cache": lambda row: f"{row['model_rss_bytes'] / 2**20:.0f}",
    }


def _digits(number: float) -> str:
    """Return a number with three digits, or with all digits before the point."""
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}" if number > 0 else "0"


def distinct(rows: Sequence[Record], name: str) -> set[int]:
    """Return the values of a field in these rows, None left out."""
    return {row[name] for row in rows if row[name] is not None}
