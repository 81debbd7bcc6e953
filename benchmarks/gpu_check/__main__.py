"""Check this package on a GPU in under five minutes.

`make gpu-check` does it, or, from the source tree with nothing built,

    PYTHONPATH=src python -m benchmarks.gpu_check build/gpu-check.json

The check needs torch, Triton and transformers, pytest for the tests, and no network. Each part runs in a process of
its own, which prints each row once it is measured, and the record is written after each part: a part that fails or
takes too long keeps its rows and does not lose the others. A part gets its own seconds and those that earlier parts
have left. A second call with the same file runs only what is not done, with all the time for that. Without a GPU every
part runs at tiny sizes on the CPU, which shows that the check works and no more.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOTAL_SECONDS = 290


def run_part(name: str, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; return its state, its seconds and the rows that it has printed."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", name]
    begin, pipe = time.monotonic(), subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
        state = "done" if process.returncode == 0 else f"failed with status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that the part has started, which keep the GPU busy
        output, errors = process.communicate()
        state = f"stopped after {seconds:.0f} s"
    rows, others = read_rows(output)
    if state == "done" and not rows:
        state = "failed, as it printed no row"
    part: dict[str, Any] = {"state": state, "seconds": time.monotonic() - begin, "rows": rows}
    if state != "done":
        part |= {"state": f"{state}; rows until then: {len(rows)}", "error": (others + errors)[-3000:]}
    return part


def read_rows(output: str) -> tuple[list[dict[str, Any]], str]:
    """Return the rows that a part has printed, one JSON object a line, and all other lines."""
    rows, others = [], []
    for line in output.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            others.append(line + "\n")
    return rows, "".join(others)


def main(arguments: list[str]) -> int:
    """Run all parts that the file lacks, or print the rows of one part; return the exit status."""
    import torch

    from benchmarks.gpu_check.parts import FULL, PARTS, TINY
    from benchmarks.gpu_check.table import show

    sizes = FULL if torch.cuda.is_available() else TINY
    if arguments[:1] == ["--part"]:
        failed = False
        for row in PARTS[arguments[1]][0](sizes):
            print(json.dumps(row, default=str), flush=True)
            failed = failed or "error" in row
        return int(failed)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(f"usage: python -m benchmarks.gpu_check FILE.json\n\n{__doc__}", file=sys.stderr)
        return 2
    file = Path(arguments[0])
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"device": sizes.device, "parts": {}}
    if record["device"] != sizes.device:
        print(f"{file} is of a check on {record['device']}, and this one is on {sizes.device}; give another file.")
        return 2
    begin = time.monotonic()
    todo = [name for name in PARTS if record["parts"].get(name, {}).get("state") != "done"]
    for number, name in enumerate(todo, start=1):
        print(f"{name} ...", file=sys.stderr, flush=True)
        later = sum(PARTS[other][1] for other in todo[number:])
        part = run_part(name, TOTAL_SECONDS - later - (time.monotonic() - begin))
        earlier = record["parts"].get(name, {"rows": []})
        if part["state"] == "done" or len(part["rows"]) >= len(earlier["rows"]):
            record["parts"][name] = part
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=2))
    table = show(record)
    file.with_suffix(".md").write_text(table)
    print(table)
    return 0 if all(part["state"] == "done" for part in record["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
