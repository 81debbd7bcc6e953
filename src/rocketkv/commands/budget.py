"""The command `rocketkv budget`: what a token budget buys."""

import json
from typing import Annotated

import typer
from rich.table import Table

from rocketkv.commands.options import AsJson, KvDtype, Selection, TokenBudget, WindowSize
from rocketkv.commands.terminal import out


def budget(
    seq_len: Annotated[int, typer.Option(min=1, help="Number of prompt tokens.")],
    token_budget: TokenBudget = 256,
    head_dim: Annotated[int, typer.Option(min=1, help="Number of channels of a key.")] = 128,
    new_tokens: Annotated[
        int, typer.Option(help="Number of tokens expected to be generated; 0 if it is not known.")
    ] = 0,
    window_size: WindowSize = 32,
    selection: Selection = None,
    kv_dtype: KvDtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Show how a token budget is split between the two stages."""
    from torch import tensor

    from rocketkv.config import DEFAULT_SELECTION, RocketKVConfig

    config = RocketKVConfig(
        token_budget=token_budget,
        window_size=window_size,
        new_tokens=new_tokens,
        selection=selection or DEFAULT_SELECTION,
        kv_dtype=kv_dtype,
    )
    split = config.budget_for(seq_len, head_dim)
    split = split._replace(top_k=min(split.top_k, split.kept_tokens + new_tokens))
    if as_json:
        print(json.dumps(split._asdict()))
        return
    total = seq_len + new_tokens
    if total <= token_budget:
        out.print(f"{total} tokens fit in the budget of {token_budget}: nothing is evicted, all is attended.")
        return
    kept = split.kept_tokens + new_tokens
    pages = -(-kept // split.page_size)
    scored_bytes = config.selection_method().scored_bytes(
        tensor([[kept]]), tensor([[split.page_size]]), tensor([[split.num_channels]]), head_dim, 2
    )
    token_bytes = 2 * 2 * head_dim  # for keys and values in 16 bits
    scoring = int(scored_bytes) / token_bytes
    attending = split.top_k * config.format.token_bytes(head_dim, 2) / token_bytes
    scored = f"{kept} tokens" if split.page_size == 1 else f"{pages} pages of {split.page_size} tokens"
    table = Table(title=f"{seq_len} prompt tokens, {new_tokens or 'unknown'} new, token budget {token_budget}")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("why")
    table.add_row("compression factor", f"{total / token_budget:.1f} x", "all tokens / token budget")
    table.add_row("prompt tokens kept", f"{split.kept_tokens}", f"stage 1 evicts all but 1 in {total / kept:.1f}")
    if scoring > 0:
        table.add_row("selection", f"{config.selection}", f"stage 2 scores {scored} ...")
        table.add_row("channels", f"{split.num_channels} of {head_dim}", "... along that many of a key's channels")
    table.add_row(
        "tokens attended exactly",
        f"{split.top_k}",
        ("the best by these scores" if scoring > 0 else "all") + ("" if config.format.is_exact else f", {kv_dtype}"),
    )
    table.add_row(
        "read per step", f"{scoring + attending:.0f} tokens' worth", f"{scoring:.0f} to score, the rest to attend"
    )
    out.print(table)
    if kept <= config.dense_tokens:
        out.print(f"So few are kept that all are attended, by default (dense_below={config.dense_tokens}).")
