"""Configurations and caches of one layer, which several test files use."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inputs import Inputs
from rocketkv import LayerCache, RocketKVConfig
from rocketkv.eviction import EVICTION_POLICIES
from rocketkv.selection import SELECTION_METHODS

ALL_METHODS = [(e, s) for e in EVICTION_POLICIES for s in SELECTION_METHODS]
IN_8_BITS = [("snapkv", "lowbit"), ("snapkv", "hybrid"), ("streaming_llm", "dense")]
WITH_8_BITS = [(*method, "auto") for method in ALL_METHODS] + [(*method, "int8") for method in IN_8_BITS]
SMALL: dict[str, Any] = {"token_budget": 20, "window_size": 8, "kernel_size": 7, "dense_below": 0}
Call = Callable[[LayerCache, Inputs], Any]
strict = partial(RocketKVConfig, dense_below=0)  # selects as soon as a row has more than top_k tokens


def decode_all(cache: LayerCache, x: Inputs, start: int, stop: int) -> Tensor:
    return torch.cat([cache.decode(*x.part(t, t + 1)) for t in range(start, stop)], dim=2)


def prefilled(x: Inputs, **options: Any) -> LayerCache:
    cache = LayerCache(RocketKVConfig(**{**SMALL, **options}))
    cache.prefill(*x.part(0, 200))
    for t in range(200, 203):
        cache.decode(*x.part(t, t + 1))
    return cache


def token(x: Inputs) -> Inputs:
    return x.part(203, 204)


def assert_same(cache: LayerCache, expected: LayerCache, x: Inputs) -> None:
    """Check that both caches store the same and go on alike, also through a prompt."""
    assert cache.num_seen == expected.num_seen
    assert cache.row_seen == expected.row_seen
    assert cache.just_prefilled == expected.just_prefilled
    assert torch.equal(cache.positions, expected.positions)
    for t in range(230, 233):
        outputs = [c.decode(*x.part(t, t + 1)) for c in (cache, expected)]
        assert torch.equal(*outputs)
        assert cache.read_bytes == expected.read_bytes
    assert torch.equal(*(c.prefill(*x.part(233, 245)) for c in (cache, expected)))
    assert torch.equal(*(c.decode(*x.part(245, 246)) for c in (cache, expected)))
    assert torch.equal(cache.positions, expected.positions)
