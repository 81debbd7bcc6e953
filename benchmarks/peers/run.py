"""Runs an engine in a process of its own, and measures there."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import ENGINES, Engine, Job, SkippedError, Token

QUIET = 0.03  # the share of CPU time below which other processes count as quiet
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Run:
    """One run of an engine.

    Attributes:
        prefill_s: the seconds until the first token.
        token_ms: the milliseconds of each token after the first.
        tokens: the tokens' ids, or their texts.
        others: the share of CPU time that other processes took during decoding, 0 to 1; None if it is not known.
        peak_mib: the most memory that the process held, loading included; None: unknown.
        version: the version of the engine's package.
    """

    prefill_s: float
    token_ms: list[float]
    tokens: list[Token]
    others: float | None
    peak_mib: float | None
    version: str


def cpu_seconds() -> tuple[float, float] | None:
    """Return the CPU seconds used so far by all processes and by this one; None where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(x) / os.sysconf("SC_CLK_TCK") for x in fields)
    own = os.times()
    return user + nice + system + irq + softirq + steal, own.user + own.system


def others_since(start_s: float, start: tuple[float, float] | None) -> float | None:
    """Return the part of the machine's CPU time that other processes have used since a moment.

    Args:
        start_s: the moment, of `time.perf_counter`.
        start: the result of `cpu_seconds` at that moment.

    Returns:
        0 to 1; None: unknown.
    """
    now = cpu_seconds()
    if start is None or now is None:
        return None
    used = (now[0] - start[0]) - (now[1] - start[1])
    return max(0.0, used) / ((time.perf_counter() - start_s) * (os.cpu_count() or 1))


def wait_for_quiet(patience_s: float) -> None:
    """Return as soon as others left the machine alone for a second, or when patience is at an end."""
    end = time.perf_counter() + patience_s
    while time.perf_counter() < end:
        start_s, start = time.perf_counter(), cpu_seconds()
        time.sleep(1)
        if (others_since(start_s, start) or 0) < QUIET:
            return


def peak_mib() -> float | None:
    """Return the most MiB that this process has used at a time; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def run_engine(engine: Engine, job: Job) -> Run:
    """Run an engine in this process.

    Raises:
        SkippedError: the engine is not installed, or its files are missing.
    """
    try:
        decode = engine.load(job)
        name = version(engine.package)
    except ImportError as error:  # PackageNotFoundError is an ImportError, too
        reason = f"no package {error}" if isinstance(error, PackageNotFoundError) else str(error)
        raise SkippedError(f"{reason}; in {sys.prefix}, see benchmarks/peers/README.md") from error
    tokens: list[Token] = []
    times: list[float] = []
    prefill_s, used, others = 0.0, None, None

    def on_token(token: Token) -> None:
        nonlocal prefill_s, used, others
        tokens.append(token)
        if len(tokens) == 1:
            prefill_s = time.perf_counter() - start
            wait_for_quiet(job.patience_s)
            used = cpu_seconds()
        times.append(time.perf_counter())
        if len(tokens) == job.new_tokens:
            others = others_since(times[0], used)

    start = time.perf_counter()
    decode(on_token)
    if len(tokens) != job.new_tokens:
        raise RuntimeError(f"{len(tokens)} tokens came, not {job.new_tokens}")
    return Run(
        prefill_s=prefill_s,
        token_ms=[1000 * (after - before) for before, after in pairwise(times)],
        tokens=tokens,
        others=others,
        peak_mib=peak_mib(),
        version=name,
    )


def child(name: str, job_file: Path) -> None:
    """Run one engine and leave the result beside the job: a run, or what kept it from running."""
    try:
        result: dict[str, Any] = asdict(run_engine(ENGINES[name], Job(**json.loads(job_file.read_text()))))
    except SkippedError as error:
        result = {"problem": f"skipped: {error}"}
    except Exception as error:  # an engine may raise any error, and the other engines must still run
        result = {"problem": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    job_file.with_suffix(".result").write_text(json.dumps(result))


def run_in_child(name: str, job: Job, python: str, timeout_s: float) -> Run | str:
    """Run one engine in a process of its own.

    Args:
        name: a key of `ENGINES`.
        job: the job to do.
        python: the interpreter.
        timeout_s: the seconds after which the engine is stopped.

    Returns:
        The run, or what kept it from running.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_file = Path(folder, "job.json")
        job_file.write_text(json.dumps(asdict(job)))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(job.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(REPOSITORY),  # the folder where another interpreter finds this package
        }
        try:
            done = subprocess.run(
                [python, "-m", "benchmarks.peers", "--engine", name, "--job", str(job_file)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except FileNotFoundError:
            return f"skipped: there is no interpreter {python}"
        except subprocess.TimeoutExpired:
            return f"failed: took longer than {timeout_s:.0f} s"
        try:
            result = json.loads(job_file.with_suffix(".result").read_text())
        except FileNotFoundError:  # the engine crashed
            return f"failed with exit status {done.returncode}: {' '.join(done.stderr.split())[-300:]}"
    return result["problem"] if "problem" in result else Run(**result)
