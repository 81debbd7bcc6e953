"""The tables of a check, beside what an H200 said of an earlier state of the kernels (docs/gpu.md)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

# Microseconds of one layer's step on the H200: low-bit, page bounds, our dense step, SDPA, the prototype in CUDA.
H200 = {
    (32768, 512, 1): (79.8, 44.0, 50.0, 38.5, 23.1),
    (131072, 256, 1): (41.7, None, 143, 126, 20.8),
    (131072, 512, 1): (85.3, 37.3, 143, 126, 23.5),
    (131072, 1024, 1): (143, None, 143, 126, 28.5),
    (32768, 512, 8): (176, 65.6, 262, 241, None),
    (16384, 512, 32): (486, None, None, None, None),
}
NAMES = ("sparse", "sparse:hybrid", "dense", "sdpa_gqa")


def show(record: Mapping[str, Any]) -> str:
    """Return Markdown tables of a record."""
    parts = record["parts"]
    lines = ["| part | state | seconds |", "|---|---|---:|"]
    lines += [f"| {name} | {part['state']} | {part['seconds']:.0f} |" for name, part in parts.items()]
    rows = {name: [row for row in part["rows"] if "error" not in row] for name, part in parts.items()}
    lines += [
        "",
        "One layer's step, microseconds (the H200's earlier figure in brackets)",
        *_steps(rows.get("steps", [])),
    ]
    lines += ["", "Kernels of the low-bit step, microseconds", *_kernels(rows.get("kernels", []))]
    lines += ["", "The low-bit step by how its kernels are launched, microseconds", *_kernels(rows.get("launches", []))]
    for name in ("models", "prefills"):
        lines += ["", name, *_times(rows.get(name, []))]
    for name in ("tests", "sanitizer"):
        outcomes = Counter(row["outcome"] for row in rows.get(name, []) if "outcome" in row)
        lines += ["", f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items()) or 'none ran'}"]
        lines += [f"- {row['test']} {row['outcome']}" for row in rows.get(name, [])
                  if row.get("outcome") in ("failed", "error")]  # fmt: skip
    for row in rows.get("machine", []):
        lines += ["", *(f"- {name}: {value}" for name, value in row.items())]
    errors = [(name, row) for name, part in parts.items() for row in part["rows"] if "error" in row]
    lines += ["", *(f"{name}: {row}" for name, row in errors)]
    return "\n".join(lines) + "\n"


def _steps(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    found: dict[tuple[int, int, int], dict[str, float]] = {}
    backends: dict[str, str] = {}
    for row in rows:
        case = (row["seq_len"], row["case_budget"], row["batch"])
        backend = f" by {row['backend']}" if row.get("backend") else ""
        backends[row["name"]] = row["name"] + backend
        found.setdefault(case, {})[row["name"]] = 1000 * row["median_ms"]
    names = list(dict.fromkeys([*NAMES, *(name for times in found.values() for name in times)]))
    titles = [backends.get(name, name) for name in names]
    lines = [f"| S, t, batch | {' | '.join(titles)} | prototype |", "|---|" + "---:|" * (len(names) + 1)]
    for case, times in found.items():
        earlier = dict(zip((*NAMES, "prototype"), H200.get(case, ()), strict=False))
        cells = [f"{times[name]:.1f}" if name in times else "-" for name in names]
        cells = [f"{x} ({earlier[n]})" if earlier.get(n) else x for n, x in zip(names, cells, strict=True)]
        lines.append(
            f"| {case[0]:,}, {case[1]}, {case[2]} | {' | '.join(cells)} | ({earlier.get('prototype') or '-'}) |"
        )
    return lines


def _kernels(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = ["| S, t, batch | backend | kernel | microseconds |", "|---|---|---|---:|"]
    for row in rows:
        case = f"{row['seq_len']:,}, {row['token_budget']}, {row['batch']}"
        lines.append(f"| {case} | {row['backend']} | {row['kernel'][:60]} | {row['us']:.1f} |")
    return lines


def _times(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = ["| what | S | t | batch | backend | ms | tokens/s |", "|---|---:|---:|---:|---|---:|---:|"]
    for row in rows:
        speed = row.get("tokens_per_second")
        case = [row["name"], f"{row['seq_len']:,}", row["token_budget"] or "", row["batch"]]
        cells = [*case, row.get("backend") or "", f"{row['median_ms']:.3f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {'' if speed is None else f'{speed:,.0f}'} |")
    return lines
