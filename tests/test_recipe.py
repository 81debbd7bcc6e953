"""Tests the recipe of AGENTS.md: a selection method and an index from outside decode in plain torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from inputs import make_inputs
from rocketkv import LayerCache, RocketKVConfig
from rocketkv.budget import Split
from rocketkv.cache import WorkingSet
from rocketkv.index import Index
from rocketkv.selection import SelectionMethod

CHANNELS = 8


class FirstChannels(Index):
    """An index with the first channels of every key."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys[..., :CHANNELS].clone()

    def extend(self, key: Tensor, slots: Tensor) -> None:
        missing = int(slots.max()) + 1 - self.keys.shape[2]
        if missing > 0:
            self.keys = torch.cat([self.keys, self.keys.new_zeros(*self.keys.shape[:2], missing, CHANNELS)], dim=2)
        at = slots[..., None, None].expand(-1, -1, 1, CHANNELS)
        self.keys = self.keys.scatter(2, at, key[..., :CHANNELS])

    def select_rows(self, rows: Tensor) -> None:
        self.keys = self.keys[rows]

    def logits(self, query: Tensor, *, num_tokens: int, scale: float, **_: Any) -> Tensor:
        return scale * query[..., :CHANNELS] @ self.keys[:, :, :num_tokens].mT


class ByFirstChannels(SelectionMethod):
    """A selection that scores tokens by the first channels of their keys."""

    def kept_tokens(self, seq_len: int, token_budget: int) -> int:
        return seq_len

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        return Split(1, CHANNELS, token_budget // 2)

    def build_index(self, working: WorkingSet, page_size: Tensor) -> FirstChannels:
        return FirstChannels(working.keys_and_values()[0])

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        return lengths * CHANNELS * element_size


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_method_and_an_index_from_outside_choose_what_plain_loops_choose(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 2, 2, 2, 210, 64)
    cache = LayerCache(RocketKVConfig(token_budget=48, selection=ByFirstChannels()))
    cache.trace = True
    cache.prefill(*x.part(0, 200))
    for end in range(201, 211):
        cache.decode(*x.part(end - 1, end))
        assert cache.backend == "reference"
        assert cache.plan is not None
        assert cache.last_attended is not None
        for row in range(2):
            top_k, sinks, recents = (int(n[row]) for n in (cache.plan.top_k, cache.plan.sinks, cache.plan.recents))
            for head in range(2):
                query = x.query[row, head, end - 1, :CHANNELS]
                scores = [float(query @ x.key[row, head, i, :CHANNELS]) for i in range(end)]
                pinned = {i for i in range(end) if i < sinks or i >= end - recents}
                others = sorted(set(range(end)) - pinned, key=lambda i: -scores[i])
                expected = pinned | set(others[: top_k - len(pinned)])
                assert set(cache.last_attended[row, head].nonzero().flatten().tolist()) == expected
