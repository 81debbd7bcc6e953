"""How each row of a batch spends its budget: what stage 1 keeps, what stage 2 reads, and for how long that holds."""

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocketkv.backends import Scoring
from rocketkv.budget import Budget, Split, check_count, dense_split, kept_tokens
from rocketkv.config import RocketKVConfig
from rocketkv.errors import ConfigError
from rocketkv.ops import stored_bytes
from rocketkv.selection import SelectionMethod

ENDLESS = 1 << 30  # tokens of a row that never ends
OUTGROWN = 1.25  # a row this much longer than planned is planned anew, so that the budget holds as it grows


def plan_eviction(config: RocketKVConfig, selection: SelectionMethod, seen: Sequence[int]) -> list[int]:
    """Tokens that stage 1 keeps of each row, given the tokens each row has `seen`."""
    kept = []
    for num_seen in seen:
        total = num_seen + config.new_tokens
        if config.budget is not None:
            kept.append(config.budget.prompt_tokens)
        elif total <= config.token_budget:
            kept.append(num_seen)
        else:
            held = selection.held_tokens(total, config.token_budget)
            held = check_count(f"{type(selection).__name__}.held_tokens: held", held, 0)
            kept.append(max(1, kept_tokens(held, num_seen, config.new_tokens)))
    return kept


@dataclass
class SelectionPlan:
    """Stage 2's parameters, row by row.

    Attributes:
        splits: what each row's step reads.
        limits: lengths beyond which a row has outgrown its split.
        page_size: `[B]` int64, of the splits.
        num_channels: `[B]` int64, of the splits.
        top_k: `[B]` int64, of the splits.
        sinks: `[B]` int64, first tokens always attended.
        recents: `[B]` int64, last tokens always attended.
        dense_lengths: `[B]` int64, up to which length a row is attended in full, top_k at least.
        dense_length: the least of them, on the host.
        steps_left: decode steps until some row would outgrow its split.
    """

    splits: list[Split]
    limits: list[int]
    page_size: Tensor
    num_channels: Tensor
    top_k: Tensor
    sinks: Tensor
    recents: Tensor
    dense_lengths: Tensor
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
    """Plan stage 2 for rows that have `seen` so many tokens, of which stage 1 left `held` (`[B, Hkv]` int64).

    Warns where a step over what is held reads more than the budget, as `RocketKVConfig.token_budget` says.

    Raises:
        ConfigError: an explicit budget does not fit head_dim, or more tokens are pinned than are attended, now or
            however long a row gets.
    """
    splits, limits = [], []
    for num_seen, num_held in zip(seen, held.amax(1).tolist(), strict=True):
        total = num_held + config.new_tokens
        if config.budget is not None:
            splits.append(Split(*config.budget[1:]))
            limits.append(sys.maxsize)
        elif num_seen + config.new_tokens <= config.token_budget:
            splits.append(dense_split(config.token_budget, head_dim))
            limits.append(config.token_budget)
        else:
            splits.append(_split(config, selection, total, head_dim))
            limits.append(int(OUTGROWN * total))
            _warn_above_budget(config, selection, splits[-1], num_held, head_dim)
    if config.budget is None:  # a row that fits in the budget now may outgrow it
        _check(config, _split(config, selection, ENDLESS, head_dim), head_dim)
    for split in splits:
        _check(config, split, head_dim)
    return _plan(config, splits, limits, held)


def plan_budget(config: RocketKVConfig, seq_len: int, head_dim: int) -> Budget:
    """What stage 1 keeps of a prompt of `seq_len` tokens, and what a step of stage 2 then reads. Raises as above."""
    selection = config.selection_method()
    (kept,) = plan_eviction(config, selection, [seq_len])
    plan = plan_prefilled(config, selection, seen=[seq_len], held=torch.tensor([[kept]]), head_dim=head_dim)
    return Budget(kept, *plan.splits[0])


def plan_outgrown(
    config: RocketKVConfig, selection: SelectionMethod, plan: SelectionPlan, *, held: Tensor, head_dim: int
) -> SelectionPlan:
    """Plan the rows anew that outgrow their `plan` with the next token, holding `held` (`[B, Hkv]` int64) now.

    Warns as `plan_prefilled` does.

    Raises:
        ConfigError: more tokens are pinned than attended.
    """
    splits, limits = list(plan.splits), list(plan.limits)
    for row, num_held in enumerate(held.amax(1).tolist()):
        if num_held >= limits[row]:
            splits[row] = _split(config, selection, num_held + 1, head_dim)
            limits[row] = int(OUTGROWN * (num_held + 1))
            _check(config, splits[row], head_dim)
            _warn_above_budget(config, selection, splits[row], num_held + 1, head_dim)
    return _plan(config, splits, limits, held)


def plan_decoded(
    config: RocketKVConfig,
    selection: SelectionMethod,
    *,
    seen: Sequence[int],
    held: Tensor,
    num_decoded: int,
    head_dim: int,
) -> SelectionPlan:
    """The plan of rows that have decoded `num_decoded` tokens since they were prefilled; `seen`, `held`: as of then."""
    plan = plan_prefilled(config, selection, seen=seen, held=held, head_dim=head_dim)
    while num_decoded > plan.steps_left:
        num_decoded -= plan.steps_left
        held = held + plan.steps_left
        plan = plan_outgrown(config, selection, plan, held=held, head_dim=head_dim)
    plan.steps_left -= num_decoded
    return plan


def select_plan_rows(config: RocketKVConfig, plan: SelectionPlan, rows: Sequence[int], held: Tensor) -> SelectionPlan:
    """The plan of a batch made of the rows `rows`, which hold `held` (`[B', Hkv]` int64) tokens."""
    return _plan(config, [plan.splits[row] for row in rows], [plan.limits[row] for row in rows], held)


def _split(config: RocketKVConfig, selection: SelectionMethod, num_tokens: int, head_dim: int) -> Split:
    """The method's split; tokens stored in 8 bits, not the 16 of a budget's, let the same bytes attend to more."""
    split = selection.split(num_tokens, config.token_budget, head_dim)
    name = f"{type(selection).__name__}.split"
    if not isinstance(split, Split):
        raise ConfigError(f"{name} returned {split!r}; return a rocketkv.budget.Split.")
    split = Split(*(check_count(f"{name}: {field}", n, 1) for field, n in zip(Split._fields, split, strict=True)))
    if config.kv_dtype == "int8":
        split = split._replace(top_k=min(split.top_k * 4 * head_dim // stored_bytes(head_dim), sys.maxsize))
    return split


def _warn_above_budget(
    config: RocketKVConfig, selection: SelectionMethod, split: Split, num_tokens: int, head_dim: int
) -> None:
    """Say where a method cannot score so many tokens within the budget: it reads one channel of each at least."""
    if split.num_channels > 1 or getattr(selection, "scoring", None) == Scoring.EXACT:  # whose scoring is not counted
        return
    lengths, page_size, num_channels = (torch.tensor([[n]]) for n in (num_tokens, split.page_size, split.num_channels))
    scored = int(selection.scored_bytes(lengths, page_size, num_channels, head_dim, 2))  # 16 bits, as the budget counts
    attended = split.top_k * (stored_bytes(head_dim) if config.kv_dtype == "int8" else 4 * head_dim)
    if scored > 0 and scored + attended > config.token_budget * 4 * head_dim:
        warnings.warn(
            f"a row has grown so long that even one channel of every token takes {type(selection).__name__} more than "
            f"its share of token_budget={config.token_budget}: its steps read more than the budget; "
            "raise token_budget, or set selection='hybrid', whose pages grow.",
            stacklevel=2,
        )


def _check(config: RocketKVConfig, split: Split, head_dim: int) -> None:
    """Refuse what could only be checked now that head_dim and top_k are known."""
    if split.num_channels > head_dim:
        raise ConfigError(
            f"budget.num_channels={split.num_channels} is more than head_dim={head_dim}; give at most that."
        )
    pinned = sum(_pins(config, split))
    if pinned > split.top_k:
        raise ConfigError(
            f"{pinned} first and last tokens are to be attended always, more than top_k={split.top_k}; "
            "lower sink_tokens or recent_tokens, or raise token_budget."
        )


def _pins(config: RocketKVConfig, split: Split) -> tuple[int, int]:
    """First and last tokens always attended."""
    recents = split.top_k // 8 if config.recent_tokens is None else config.recent_tokens
    return config.sink_tokens, recents


def _plan(config: RocketKVConfig, splits: list[Split], limits: list[int], held: Tensor) -> SelectionPlan:
    def column(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=held.device)

    pins = [_pins(config, split) for split in splits]
    dense_lengths = [max(split.top_k, config.dense_tokens) for split in splits]
    return SelectionPlan(
        splits=splits,
        limits=limits,
        page_size=column(split.page_size for split in splits),
        num_channels=column(split.num_channels for split in splits),
        top_k=column(split.top_k for split in splits),
        sinks=column(sinks for sinks, _ in pins),
        recents=column(recents for _, recents in pins),
        dense_lengths=column(dense_lengths),
        dense_length=min(dense_lengths),
        steps_left=min(limit - length for limit, length in zip(limits, held.amax(1).tolist(), strict=True)),
    )
