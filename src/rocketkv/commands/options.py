"""Options that several commands share, and how a command takes them as one dataclass."""

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from rocketkv.errors import InputError

Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, local folder, GGUF file, smollm2 or gemma3-270m.")]
TokenBudget = Annotated[int, typer.Option("--token-budget", "-t", help="KV traffic per decode step, in tokens.")]
WindowSize = Annotated[int, typer.Option(help="Number of last prompt tokens that decide which tokens stay.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, or cuda or cuda:1 for a GPU.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
WeightDtype = Annotated[
    str | None, typer.Option(help="int8 or int4: the format of linear layers' weights. Default: the one of --dtype.")
]
Selection = Annotated[
    str | None,
    typer.Option(help="Selection method, stage 2: lowbit, hybrid, dense or another. Default: the library's."),
]
KvDtype = Annotated[
    str, typer.Option(help="auto, or int8: store keys and values in 8 bits and attend to twice as many.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses: each field becomes an option.

    A parameter's default instance of the dataclass gives the defaults of its options.
    """
    options: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, each in inspect.signature(command).parameters.items():
        if not is_dataclass(each.default):
            options.append(each)
            continue
        groups[name] = type(each.default)
        for option in inspect.signature(groups[name]).parameters.values():
            options.append(option.replace(default=getattr(each.default, option.name)))

    @wraps(command)
    def wrapped(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    wrapped.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # where typer looks
    return wrapped


def numbers(name: str, text: str) -> list[int]:
    """Read whole numbers separated by commas, and give each number once.

    Raises:
        InputError: the text of option `name` is no such list, or a number is below 1.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name}={text!r} is no list of numbers; separate numbers by commas, as in 128,256.") from None
    if min(found) < 1:
        raise InputError(f"{name}={text!r} has a number below 1; give positive ones.")
    return list(dict.fromkeys(found))
