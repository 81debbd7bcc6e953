"""The command `rocketkv bench memory`: peaks of the full and the compressed cache."""

from typing import Annotated

import typer

from rocketkv.commands.bench import Sweep
from rocketkv.commands.options import numbers
from rocketkv.commands.terminal import counted
from rocketkv.errors import InputError


def memory(
    sweep: Sweep = Sweep(),
    prefill_len: Annotated[
        str, typer.Option(help="Numbers of tokens to prefill, separated by commas; these prompts are computed.")
    ] = "4096",
    phases: Annotated[str, typer.Option(help="prefill, decode or both, separated by a comma.")] = "prefill,decode",
) -> None:
    """Measure peak memory and KV bytes of the full and the compressed cache, each in its own process."""
    from rocketkv.bench.memory import PHASES, cases, measure_memory

    lengths, batches, budgets = sweep.axes()
    wanted = phases.split(",")
    for phase in wanted:
        if phase not in PHASES:
            raise InputError(f"phases={phases!r} has {phase!r}; choose from {', '.join(PHASES)}.")
    dtype = str(sweep.torch_dtype).removeprefix("torch.")
    prefills = numbers("prefill-len", prefill_len)
    todo = list(cases(sweep.geometry, dtype, wanted, lengths, prefills, budgets, batches))
    with counted("memory", todo) as items:
        rows = [measure_memory(case) for case, _ in items]
    sweep.report("memory", rows)
