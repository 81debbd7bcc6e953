"""How each row of a batch spends its budget: what stage 1 keeps, what stage 2 reads, and for how long that holds."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocketkv.budget import Split
from rocketkv.config import RocketKVConfig
from rocketkv.selection import SelectionMethod

OUTGROWN = 1.25  # a row this much longer than planned is planned anew, so that the budget holds as it grows


def tokens_to_keep(config: RocketKVConfig, selection: SelectionMethod, seen: Sequence[int]) -> list[int]:
    """Tokens that stage 1 keeps of each row, given the tokens each row has `seen`."""
    return [_tokens_to_keep(config, selection, n) for n in seen]


def _tokens_to_keep(config: RocketKVConfig, selection: SelectionMethod, seen: int) -> int:
    if config.budget is not None:
        return min(seen, config.budget.prompt_tokens)
    total = seen + config.new_tokens
    if total <= config.token_budget:
        return seen
    held = max(selection.held_tokens(total, config.token_budget), min(2 * config.new_tokens, total))
    return max(1, held - config.new_tokens)


@dataclass
class SelectionPlan:
    """Stage 2's parameters, row by row.

    Attributes:
        splits: what each row's step reads.
        limits: lengths beyond which a row has outgrown its split.
        page_size: `[B]` int64, of the splits.
        num_channels: `[B]` int64, of the splits.
        top_k: `[B]` int64, of the splits; a row that holds no more is attended densely.
        sinks: `[B]` int64, first tokens always attended.
        recents: `[B]` int64, last tokens always attended.
        dense_length: up to this length every row is attended densely.
        steps_left: decode steps until some row outgrows its split.
    """

    splits: list[Split]
    limits: list[int]
    page_size: Tensor
    num_channels: Tensor
    top_k: Tensor
    sinks: Tensor
    recents: Tensor
    dense_length: int
    steps_left: int


def plan_prefilled(
    config: RocketKVConfig,
    selection: SelectionMethod,
    *,
    seen: Sequence[int],
    held: Tensor,
    head_dim: int,
) -> SelectionPlan:
    """Plan stage 2 for rows that have `seen` so many tokens, of which stage 1 left `held` (`[B, Hkv]` int64)."""
    splits, limits = [], []
    for num_seen, num_held in zip(seen, held.amax(1).tolist(), strict=True):
        total = num_held + config.new_tokens
        if config.budget is not None:
            splits.append(Split(*config.budget[1:]))
            limits.append(sys.maxsize)
        elif num_seen + config.new_tokens <= config.token_budget:
            splits.append(Split(1, head_dim, config.token_budget))  # dense while it fits
            limits.append(config.token_budget)
        else:
            splits.append(selection.split(total, config.token_budget, head_dim))
            limits.append(int(OUTGROWN * total))
    return _plan(config, splits, limits, held)


def plan_outgrown(
    config: RocketKVConfig, selection: SelectionMethod, plan: SelectionPlan, *, held: Tensor, head_dim: int
) -> SelectionPlan:
    """Plan the rows anew that have outgrown their `plan`, holding `held` (`[B, Hkv]` int64) tokens now."""
    splits, limits = list(plan.splits), list(plan.limits)
    for row, num_held in enumerate(held.amax(1).tolist()):
        if num_held > limits[row]:
            splits[row] = selection.split(num_held, config.token_budget, head_dim)
            limits[row] = int(OUTGROWN * num_held)
    return _plan(config, splits, limits, held)


def select_plan_rows(config: RocketKVConfig, plan: SelectionPlan, rows: Sequence[int], held: Tensor) -> SelectionPlan:
    """The plan of a batch made of the rows `rows`, which hold `held` (`[B', Hkv]` int64) tokens."""
    return _plan(config, [plan.splits[row] for row in rows], [plan.limits[row] for row in rows], held)


def _plan(config: RocketKVConfig, splits: list[Split], limits: list[int], held: Tensor) -> SelectionPlan:
    def column(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=held.device)

    sinks, recents = config.sink_tokens, config.recent_tokens
    return SelectionPlan(
        splits=splits,
        limits=limits,
        page_size=column(split.page_size for split in splits),
        num_channels=column(split.num_channels for split in splits),
        top_k=column(split.top_k for split in splits),
        sinks=column(split.top_k // 8 if sinks is None else sinks for split in splits),
        recents=column(split.top_k // 8 if recents is None else recents for split in splits),
        dense_length=min(split.top_k for split in splits),
        steps_left=min(limit - length for limit, length in zip(limits, held.amax(1).tolist(), strict=True)),
    )
