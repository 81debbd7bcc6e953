"""The command `rocketkv recommend`: which token budget a model needs on a text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from rocketkv.commands.options import AsJson, Dtype, KvDtype, Model, Selection, numbers
from rocketkv.commands.terminal import lasting_bar, load_model, out, read_text
from rocketkv.errors import InputError

if TYPE_CHECKING:
    from rocketkv.eval.recommend import Measured


def recommend(
    file: Annotated[Path, typer.Option("--file", "-f", help="A text like yours, UTF-8; - for standard input.")],
    model: Model = "smollm2",
    budgets: Annotated[
        str | None,
        typer.Option(help="Token budgets, separated by commas. Default: those of 128,256,512,1024 below --length."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Number of tokens of a prompt. Default: all that text and model allow, at most 4096."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Number of passages of the text. Default: 2, or 1 if the text is short.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to predict after each prompt.")] = 128,
    target: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the full cache's next tokens to keep, 0 to 1.")
    ] = 0.9,
    selection: Selection = None,
    kv_dtype: KvDtype = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure which token budget a model needs on a text, and say so in one line."""
    from rocketkv.config import DEFAULT_SELECTION
    from rocketkv.eval.recommend import BUDGETS, advise, cut_passages, find_budget, measure, warn
    from rocketkv.eval.run.methods import make_arms

    chosen = selection or DEFAULT_SELECTION
    method = f"rocketkv:selection={chosen}:kv_dtype={kv_dtype}"
    asked = list(BUDGETS) if budgets is None else numbers("budgets", budgets)
    make_arms([method], asked)  # this refuses bad budgets and options before the model is loaded
    text = read_text(file)
    loaded = load_model(model, dtype)
    passages = cut_passages(loaded.tokenizer, text, loaded.context_length, new_tokens, length, samples)
    too_large = [budget for budget in asked if budget >= passages.length]
    if too_large and (budgets is not None or len(too_large) == len(asked)):
        raise InputError(
            f"a budget of {too_large[0]} is not below the prompt's {passages.length} tokens, so that nothing is "
            "compressed; give smaller --budgets or a longer prompt."
        )
    fitting = [budget for budget in asked if budget < passages.length]
    with lasting_bar() as progress:
        task = progress.add_task("measuring", total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        measured = measure(loaded, passages, method, fitting, on_progress)
    advice, warning = advise(measured, target), warn(measured)
    if as_json:
        facts = {
            "model": model,
            "dtype": dtype,
            "selection": chosen,
            "kv_dtype": kv_dtype,
            "prompt_tokens": passages.length,
            "new_tokens": new_tokens,
            "passages": len(passages.token_ids),
            "target": target,
            "budgets": [one._asdict() for one in measured],
            "token_budget": find_budget(measured, target),
            "advice": advice,
            "warning": warning,
        }
        print(json.dumps(facts, indent=2))
        return
    sizes = f"prompts of {passages.length} tokens, {len(passages.token_ids)} x {new_tokens} tokens predicted"
    out.print(_table(measured, sizes))
    out.print(advice, soft_wrap=True)
    if warning:
        out.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def _table(measured: "Sequence[Measured]", sizes: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption=f"{sizes}; agreement: of the next token, with the full cache")
    for column in ("budget", "agreement", "oracle", "KL", "oracle", "read per step"):
        table.add_column(column, justify="right")
    for one in measured:
        table.add_row(
            f"{one.token_budget}",
            f"{one.agreement:.1%}",
            f"{one.oracle_agreement:.1%}",
            f"{one.kl:.3f}",
            f"{one.oracle_kl:.3f}",
            f"{one.read_fraction:.1%}",
        )
    return table
