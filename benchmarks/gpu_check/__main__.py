"""Check this package on a GPU in under five minutes.

`make gpu-check` does it, or, from the source tree with nothing built,

    PYTHONPATH=src python -m benchmarks.gpu_check build/gpu-check.json

The check needs torch, Triton and transformers, pytest for the tests, and no network. Each part runs in a process of
its own, and the record is written after each: a part that fails or takes too long does not lose the others, and a
second call with the same file runs only what is missing. Without a GPU every part runs at tiny sizes on the CPU, which
shows that the check works and no more.
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
    """Run a part in a process of its own; return its state, its seconds and its rows."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", name]
    begin, pipe = time.monotonic(), subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that the part has started, which keep the GPU busy
        process.communicate()
        return {"state": f"stopped after {seconds:.0f} s", "seconds": time.monotonic() - begin}
    part: dict[str, Any] = {"state": "done", "seconds": time.monotonic() - begin}
    if process.returncode != 0:
        return part | {"state": f"failed with status {process.returncode}", "error": errors[-3000:]}
    return part | {"rows": json.loads(output.splitlines()[-1])}


def main(arguments: list[str]) -> int:
    """Run all parts that the file lacks, or print the rows of one part; return the exit status."""
    import torch

    from benchmarks.gpu_check.parts import FULL, PARTS, TINY
    from benchmarks.gpu_check.table import show

    sizes = FULL if torch.cuda.is_available() else TINY
    if arguments[:1] == ["--part"]:
        print(json.dumps(PARTS[arguments[1]][0](sizes), default=str))
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(f"usage: python -m benchmarks.gpu_check FILE.json\n\n{__doc__}", file=sys.stderr)
        return 2
    file = Path(arguments[0])
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"device": sizes.device, "parts": {}}
    if record["device"] != sizes.device:
        print(f"{file} is of a check on {record['device']}, and this one is on {sizes.device}; give another file.")
        return 2
    begin = time.monotonic()
    for name, (_, seconds) in PARTS.items():
        if record["parts"].get(name, {}).get("state") == "done":
            continue
        left = TOTAL_SECONDS - (time.monotonic() - begin)
        if left < 10:
            record["parts"][name] = {"state": "not run, as the time was up; run the check again", "seconds": 0.0}
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            record["parts"][name] = run_part(name, min(seconds, left))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=2))
    table = show(record)
    file.with_suffix(".md").write_text(table)
    print(table)
    return 0 if all(part["state"] == "done" for part in record["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
