"""Results for people and for programs: a table, one JSON object, a plot."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rocketkv.bench.timing import floor_of
from rocketkv.errors import InputError

Record = Mapping[str, Any]

AXES = {"seq_len": "tokens", "token_budget": "token budget", "batch": "batch"}
PLOT_FORMATS = (".png", ".svg")

OTHERS = ("sdpa_grouped", "flash_attn", "transformers_default", "full")  # their floor is that of our dense attention

out = Console(highlight=False)


def print_json(result: Record) -> None:
    """One object and nothing else."""
    print(json.dumps(result, indent=2))


def print_result(result: Record) -> None:
    """A table, and below it what the figures depend on."""
    rows: Sequence[Record] = result["rows"]
    fixed = [f"{AXES[name]} {_values(rows, name).pop()}" for name in AXES if len(_values(rows, name)) == 1]
    title = ", ".join([f"{result['benchmark']}: {result['model']}", result["dtype"], *fixed])
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    is_memory = result["benchmark"] == "memory"
    columns = _axis_columns(rows) | (_memory_columns() if is_memory else _time_columns(rows))
    for name in columns:
        table.add_column(name, justify="left" if name in ("what", "path") else "right", no_wrap=True)
    for row in rows:
        if row["name"].endswith("_floor"):  # floors have a column
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
        out.print("Not all fitted in memory at once: where not interleaved, one was measured after the other.")
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
    """Name what was swept; what was not stands in the title."""
    columns: dict[str, Any] = {
        "tokens": ("seq_len", lambda row: str(row["seq_len"])),
        "t": ("token_budget", lambda row: str(row["token_budget"] or "")),
        "batch": ("batch", lambda row: str(row["batch"])),
    }
    return {name: render for name, (axis, render) in columns.items() if len(_values(rows, axis)) > 1}


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
    """Three digits, or all those before the point."""
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}" if number > 0 else "0"


def check_plot(path: Path | None) -> None:
    """Refuse a plot that could not be drawn, before anything is measured.

    Raises:
        InputError: the name ends in no known format, its folder does not exist, or matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix not in PLOT_FORMATS:
        raise InputError(f"plot={str(path)!r} is no picture that can be drawn; end it in {' or '.join(PLOT_FORMATS)}.")
    if not path.parent.is_dir():
        raise InputError(f"plot={str(path)!r} lies in a folder that does not exist; make it first.")
    if find_spec("matplotlib") is None:
        raise InputError("drawing needs matplotlib, which is not installed; run `pip install rocketkv[plot]`.")


def save_plot(result: Record, path: Path) -> None:
    """Draw time, or for memory the peak, against what was swept, on logarithmic axes; floors are dashed."""
    from matplotlib.figure import Figure

    rows: Sequence[Record] = result["rows"]
    value, label = (
        ("peak_rss_bytes", "peak bytes") if result["benchmark"] == "memory" else ("median_ms", "milliseconds")
    )
    axis = next((name for name in AXES if len(_values(rows, name)) > 1), "seq_len")
    others = [name for name in AXES if name != axis and len(_values(rows, name)) > 1]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    plot = figure.add_subplot(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=label)
    colors: dict[tuple[object, ...], str] = {}  # a floor has the colour of what it is the floor of
    for line_label, line in _lines(rows, [*others, "path"]).items():
        points = sorted((row[axis], row[value]) for row in line if row[axis] is not None)
        if not points:  # the same for every value on the axis
            points = [(x, line[0][value]) for x in sorted(_values(rows, axis))]
        is_floor = line[0]["name"].endswith("_floor")
        name = line[0]["name"] if is_floor else floor_of(line[0]["name"]) or line[0]["name"]
        group = (name, *(line[0][other] for other in others))
        color = colors.get(group) if is_floor else None
        (drawn,) = plot.plot(*zip(*points, strict=True), "--" if is_floor else "o-", label=line_label, color=color)
        colors.setdefault(group, drawn.get_color())
    plot.set_xticks(sorted(_values(rows, axis)), [f"{x:,}" for x in sorted(_values(rows, axis))], minor=False)
    plot.minorticks_off()
    plot.set_title(f"{result['benchmark']}, {result['model']}, {result['dtype']}")
    plot.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=150)


def _values(rows: Sequence[Record], name: str) -> set[int]:
    return {row[name] for row in rows if row[name] is not None}


def _lines(rows: Sequence[Record], names: Sequence[str]) -> dict[str, list[Record]]:
    """Rows that belong to one line, by its label."""
    lines: dict[str, list[Record]] = {}
    for row in rows:
        parts = [str(row["name"])]
        for name in names:
            if row.get(name) is not None:
                parts.append(str(row[name]) if name == "path" else f"{name}={row[name]}")
        lines.setdefault(", ".join(parts), []).append(row)
    return lines
