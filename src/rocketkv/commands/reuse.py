"""The command `rocketkv bench reuse`: what a saved document saves the second question, and what forks of it hold."""

from typing import Annotated, Any

import typer

from rocketkv.bench.output import print_json, print_result
from rocketkv.bench.timing import Pace
from rocketkv.commands.bench import Dtype, Repeats
from rocketkv.commands.options import AsJson, Model, TokenBudget
from rocketkv.commands.terminal import counted, load_model, out


def reuse(
    model: Model = "smollm2",
    seq_len: Annotated[int, typer.Option(min=64, help="Tokens of the document.")] = 7500,
    token_budget: TokenBudget = 256,
    dtype: Dtype = "auto",
    forks: Annotated[int, typer.Option(min=1, help="Forks whose memory is measured.")] = 16,
    repeats: Repeats = 3,
    as_json: AsJson = False,
) -> None:
    """Time the first token of a second question on a saved document, and measure the memory of many forks."""
    from rocketkv.bench.reuse import measure_first_token, measure_forks
    from rocketkv.config import RocketKVConfig
    from rocketkv.machine import describe_machine, describe_versions

    config = RocketKVConfig(token_budget=token_budget, mode="multi_turn")
    loaded = load_model(model, dtype)
    with counted("reuse", [f"S={seq_len}"]) as items:
        for _, on_round in items:
            held = measure_forks(loaded.model, config, seq_len, forks)
            rows = measure_first_token(loaded.model, config, seq_len, Pace(repeats), on_round)
    result: dict[str, Any] = {
        "benchmark": "reuse",
        "model": model,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "rows": [row.record() for row in rows],
        "forks": held,
    }
    if as_json:
        print_json(result)
        return
    print_result(result)
    memory, bound = held["memory_bytes"] / 2**20, held["bound_bytes"] / 2**20
    out.print(f"{forks} forks hold {memory:.0f} MiB; one archive, their working sets and 5%: {bound:.0f} MiB.")
