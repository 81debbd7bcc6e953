"""`rocketkv budget`."""

import json
from typing import Annotated

import typer
from rich.table import Table

from rocketkv.commands.options import AsJson, TokenBudget
from rocketkv.commands.terminal import out


def budget(
    seq_len: Annotated[int, typer.Option(help="Prompt tokens.")],
    token_budget: TokenBudget = 256,
    head_dim: Annotated[int, typer.Option(help="Channels of a key.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens expected to be generated; 0: unknown.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show how a token budget is split between the two stages."""
    from rocketkv.budget import split_budget

    split = split_budget(seq_len, token_budget, head_dim, new_tokens=new_tokens)
    if as_json:
        print(json.dumps(split._asdict()))
        return
    total = seq_len + new_tokens
    if total <= token_budget:
        out.print(f"{total} tokens fit in the budget of {token_budget}: nothing is compressed, attention is exact.")
        return
    held = split.prompt_tokens + new_tokens
    pages = -(-held // split.page_size)
    scoring = pages * split.num_channels / (2 * head_dim)
    table = Table(title=f"{seq_len} prompt tokens, {new_tokens or 'unknown'} new, token budget {token_budget}")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("why")
    table.add_row("compression factor", f"{total / token_budget:.1f} x", "all tokens / token budget")
    table.add_row("prompt tokens kept", f"{split.prompt_tokens}", f"stage 1 evicts all but 1 in {total / held:.1f}")
    table.add_row("page size", f"{split.page_size}", f"stage 2 scores {pages} pages of kept tokens ...")
    table.add_row("channels", f"{split.num_channels} of {head_dim}", "... along the query's largest channels")
    table.add_row("tokens attended exactly", f"{split.top_k}", "half of the budget")
    table.add_row(
        "read per step", f"{scoring + split.top_k:.0f} tokens' worth", f"{scoring:.0f} to score, the rest to attend"
    )
    out.print(table)
