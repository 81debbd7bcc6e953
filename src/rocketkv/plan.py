"""The plan of each row's budget: what stage 1 keeps, what stage 2 reads, and for how many steps the plan lasts."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rocketkv.backends import Scoring
from rocketkv.budget import Budget, Split, check_count, dense_split, prompt_share
from rocketkv.errors import ConfigError
from rocketkv.ops import on_device
from rocketkv.selection import SelectionMethod

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig

ENDLESS = 1 << 30  # the tokens of a row that stands for rows of any length
OUTGROWN = (
    1.25  # a row that is longer than planned by this factor is planned anew, so that growing rows keep the budget
)


@dataclass
class SelectionPlan:
    """The parameters of stage 2, row by row.

    Attributes:
        splits: the split of each row, which says what a step reads.
        limits: the number of kept tokens beyond which each row has outgrown its split.
        page_size: `[B]` int64 on the host, the tokens per page.
        num_channels: `[B]` int64, the channels read per page.
        top_k: `[B]` int64, the tokens that a step attends to.
        sinks: `[B]` int64, the number of first kept tokens that every step attends to.
        recents: `[B]` int64, the number of last tokens that every step attends to.
        dense_lengths: `[B]` int64, at least top_k; a row with at most this many kept tokens is attended in full.
        dense_length: the smallest of the dense lengths, a number on the host.
        steps_left: the number of decode steps until some row would outgrow its split.
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


@dataclass(frozen=True)
class Planner:
    """Plans the rows of a batch by the options of a configuration.

    Attributes:
        config: the configuration.
        selection: the selection method, stage 2.
        head_dim: the number of channels of a key.
        device: the device for the tensors of the plans.
    """

    config: "RocketKVConfig"
    selection: SelectionMethod
    head_dim: int
    device: torch.device

    def keep(self, seen: Sequence[int]) -> list[int]:
        """Return the number of tokens that stage 1 keeps of each row, given the number that each row has `seen`.

        Raises:
            ConfigError: a selection method of your own asks for a number that is not a whole number >= 0.
        """
        config, kept = self.config, []
        for num_seen in seen:
            total = num_seen + config.new_tokens
            if config.budget is not None:
                kept.append(config.budget.kept_tokens)
            elif total <= config.token_budget:
                kept.append(num_seen)
            else:
                wanted = self.selection.kept_tokens(total, config.token_budget)
                wanted = check_count(f"{type(self.selection).__name__}.kept_tokens: kept", wanted, 0)
                kept.append(max(1, prompt_share(wanted, num_seen, config.new_tokens)))
        return kept

    def prefilled(self, seen: Sequence[int], kept: Sequence[int]) -> SelectionPlan:
        """Plan stage 2 for rows that have `seen` so many tokens, of which stage 1 kept `kept` (in the fullest head).

        The method warns where a step must read more than the budget; see `RocketKVConfig.token_budget`.

        Raises:
            ConfigError: an explicit budget does not fit head_dim, a selection method of your own returns no valid
                split, or more tokens are pinned than a step attends to, at this length or at a later one.
        """
        config, splits, limits = self.config, [], []
        for num_seen, num_kept in zip(seen, kept, strict=True):
            total = num_kept + config.new_tokens
            if config.budget is not None:
                splits.append(Split(*config.budget[1:]))
                limits.append(sys.maxsize)
            elif num_seen + config.new_tokens <= config.token_budget:
                splits.append(dense_split(config.token_budget, self.head_dim))
                limits.append(config.token_budget)
            else:
                splits.append(self._split(total))
                limits.append(int(OUTGROWN * total))
                self._warn_above_budget(splits[-1], num_kept)
        if config.budget is None:  # a row that fits in the budget now may outgrow it
            self._check(self._split(ENDLESS))
        for split in splits:
            self._check(split)
        return self._plan(splits, limits, kept)

    def outgrown(self, plan: SelectionPlan, kept: Sequence[int]) -> SelectionPlan:
        """Plan anew the rows that outgrow `plan` with the next token; rows have `kept` tokens.

        The method warns as `prefilled` does.

        Raises:
            ConfigError: more tokens are pinned than a step attends to.
        """
        splits, limits = list(plan.splits), list(plan.limits)
        for row, num_kept in enumerate(kept):
            if num_kept >= limits[row]:
                splits[row] = self._split(num_kept + 1)
                limits[row] = int(OUTGROWN * (num_kept + 1))
                self._check(splits[row])
                self._warn_above_budget(splits[row], num_kept + 1)
        return self._plan(splits, limits, kept)

    def decoded(self, seen: Sequence[int], kept: Sequence[int], num_decoded: int) -> SelectionPlan:
        """Return the plan after `num_decoded` decode steps; the prefill left rows with `seen` and `kept` tokens."""
        plan = self.prefilled(seen, kept)
        while num_decoded > plan.steps_left:
            num_decoded -= plan.steps_left
            kept = [num_kept + plan.steps_left for num_kept in kept]
            plan = self.outgrown(plan, kept)
        plan.steps_left -= num_decoded
        return plan

    def resumed(self, splits: list[Split], limits: list[int], kept: Sequence[int]) -> SelectionPlan:
        """The plan that had these splits and limits, of rows that have `kept` tokens.

        Raises:
            ConfigError: a split does not fit head_dim, or pins more tokens than are attended.
        """
        for split in splits:
            self._check(split)
        return self._plan(splits, limits, kept)

    def select_rows(self, plan: SelectionPlan, rows: Sequence[int], kept: Sequence[int]) -> SelectionPlan:
        """Return the plan of a batch of the rows `rows` of `plan`, which have `kept` tokens."""
        return self._plan([plan.splits[row] for row in rows], [plan.limits[row] for row in rows], kept)

    def budget_for(self, seq_len: int) -> Budget:
        """See `RocketKVConfig.budget_for`."""
        (kept,) = self.keep([check_count("seq_len", seq_len, 1)])
        return Budget(kept, *self.prefilled([seq_len], [kept]).splits[0])

    def _split(self, num_tokens: int) -> Split:
        """Return the method's split, with a larger `top_k` where the format stores a token in less than 16 bits."""
        split = self.selection.split(num_tokens, self.config.token_budget, self.head_dim)
        name = f"{type(self.selection).__name__}.split"
        if not isinstance(split, Split):
            raise ConfigError(f"{name} returned {split!r}; return a rocketkv.budget.Split.")
        split = Split(*(check_count(f"{name}: {field}", n, 1) for field, n in zip(Split._fields, split, strict=True)))
        top_k = self.config.format.affordable(split.top_k, self.head_dim)
        return split._replace(top_k=min(top_k, sys.maxsize))

    def _warn_above_budget(self, split: Split, num_tokens: int) -> None:
        """Warn if a method reads more than the budget although it reads one channel of every token only."""
        if split.num_channels > 1 or getattr(self.selection, "scoring", None) == Scoring.EXACT:  # exact has no budget
            return
        budget, head_dim = self.config.token_budget, self.head_dim
        lengths, page_size, num_channels = (
            torch.tensor([[n]], device="cpu") for n in (num_tokens, split.page_size, split.num_channels)
        )
        scored = int(self.selection.scored_bytes(lengths, page_size, num_channels, head_dim, 2))  # as the budget counts
        attended = split.top_k * self.config.format.token_bytes(head_dim, 2)
        if scored > 0 and scored + attended > budget * 4 * head_dim:
            warnings.warn(
                f"a row has grown so long that {type(self.selection).__name__}, which reads at least one channel of "
                f"every token, reads more than token_budget={budget} in each step; "
                "raise token_budget, or set selection='hybrid', whose pages grow with the row.",
                stacklevel=2,
            )

    def _check(self, split: Split) -> None:
        """Raise a ConfigError if the split does not fit head_dim, or pins more tokens than `top_k`."""
        if split.num_channels > self.head_dim:
            raise ConfigError(
                f"budget.num_channels={split.num_channels} is more than head_dim={self.head_dim}; "
                f"give at most {self.head_dim}."
            )
        pinned = sum(self._pins(split))
        if pinned > split.top_k:
            raise ConfigError(
                f"{pinned} tokens are pinned, but a step attends to top_k={split.top_k} only; "
                "lower sink_tokens or recent_tokens, or raise token_budget."
            )

    def _pins(self, split: Split) -> tuple[int, int]:
        """Return how many first and how many last kept tokens every step attends to."""
        recents = split.top_k // 8 if self.config.recent_tokens is None else self.config.recent_tokens
        return self.config.sink_tokens, recents

    def _plan(self, splits: list[Split], limits: list[int], kept: Sequence[int]) -> SelectionPlan:
        dense_lengths = [max(split.top_k, self.config.dense_tokens) for split in splits]
        rows = [
            (split.num_channels, split.top_k, *self._pins(split), dense_length)
            for split, dense_length in zip(splits, dense_lengths, strict=True)
        ]
        columns = torch.tensor(rows, dtype=torch.int64, device="cpu").T
        num_channels, top_k, sinks, recents, dense = on_device(columns, self.device)
        return SelectionPlan(
            splits=splits,
            limits=limits,
            page_size=torch.tensor([split.page_size for split in splits], device="cpu"),
            num_channels=num_channels,
            top_k=top_k,
            sinks=sinks,
            recents=recents,
            dense_lengths=dense,
            dense_length=min(dense_lengths),
            steps_left=min(limit - length for limit, length in zip(limits, kept, strict=True)),
        )
