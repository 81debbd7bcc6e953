"""The command line of the study."""

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from rocketkv.errors import RocketKVError
from studies.lowbit_forms.forms import AXES, REFERENCES
from studies.lowbit_forms.measure import measure
from studies.lowbit_forms.study import Study
from studies.lowbit_forms.traces import NEW_TOKENS, WINDOW, Case, capture


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Compares forms of low-bit keys by the error of attention's output.")
    parser.add_argument("texts", type=Path, nargs="+", help="files with texts")
    parser.add_argument("--model", default="smollm2", help="as for rocketkv")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 7424], help="tokens of the prefixes")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512], help="tokens")
    parser.add_argument("--layers", type=int, default=8, help="how many layers, evenly spread")
    parser.add_argument("--steps", type=int, default=24, help=f"how many of the {NEW_TOKENS} steps after a prefix")
    parser.add_argument("--axes", nargs="+", choices=AXES, metavar="AXIS", default=list(AXES), help=", ".join(AXES))
    parser.add_argument("--cache", type=Path, default=Path("build/forms"), metavar="FOLDER", help="for the traces")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="for every figure, as gzipped JSON")
    arguments = parser.parse_args()
    for text in arguments.texts:
        if not text.is_file():
            parser.error(f"there is no file {text}.")
    if min(arguments.lengths) <= WINDOW or min(arguments.budgets) < WINDOW or arguments.layers < 1:
        parser.error(f"--lengths must be more than {WINDOW}, --budgets {WINDOW} or more, --layers 1 or more.")
    if not 2 <= arguments.steps <= NEW_TOKENS:
        parser.error(f"--steps {arguments.steps} is not from 2 to {NEW_TOKENS}.")
    return arguments


@torch.inference_mode()
def run(arguments: argparse.Namespace, console: Console) -> Study:
    """Measure every form on every text, length, layer and budget.

    Raises:
        InputError: a text is too short, or the model cannot be loaded or has too few layers.
    """
    forms = {**REFERENCES, **{name: form for axis in arguments.axes for name, form in AXES[axis].items()}}
    num_tokens = max(arguments.lengths) + NEW_TOKENS
    traces = {
        text: capture(arguments.model, text, num_tokens, arguments.layers, arguments.cache)
        for text in track(arguments.texts, "reading", console=console)
    }
    study = Study.of(forms)
    places = list(product(traces, range(arguments.layers), arguments.lengths))
    for text, layer, length in track(places, "choosing", console=console):
        case = Case(traces[text][layer], length, arguments.steps)
        for budget, (name, form) in product(arguments.budgets, forms.items()):
            outcome = measure(form, case, budget)
            study.add(name, outcome, text=text.stem, length=length, layer=layer, budget=budget)
    return study


def main() -> None:
    """Measure, write and show."""
    arguments = parse_arguments()
    try:
        study = run(arguments, Console(stderr=True))
    except RocketKVError as error:
        sys.exit(f"error: {error}")
    study.write(arguments.out)
    study.show()


if __name__ == "__main__":
    main()
