"""Tests of `load_tokens`: a cache goes on from keys and values that another cache prefilled."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from caches import SMALL, strict
from inputs import Inputs, make_inputs
from rocketkv import InputError, LayerCache, RocketKVConfig


def test_what_cannot_be_loaded_is_refused(seeded: torch.Generator) -> None:
    _, keys, values = make_inputs(seeded, num_tokens=40)
    with pytest.raises(InputError, match="num_seen=39 does not fit 40 tokens; give a number from 40 to"):
        LayerCache(strict(token_budget=64)).load_tokens(keys, values, num_seen=39)
    with pytest.raises(
        InputError, match="a multi_turn cache keeps every token, so 40 of 50 seen tokens cannot be loaded"
    ):
        LayerCache(strict(token_budget=64, mode="multi_turn")).load_tokens(keys, values, num_seen=50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: (k, k.half(), 300, None), "give one dtype for all"),
        (lambda k: (k, k[..., :8], 300, None), "cannot be loaded; give both as"),
        (lambda k: (k, k[:, :1], 300, None), "cannot be loaded; give both as"),
        (lambda k: (k, k[:, :, :9], 300, None), "cannot be loaded; give both as"),
        (lambda k: (k[0], k[0], 300, None), "cannot be loaded; give both as"),
        (lambda k: (k[:, :, :0], k[:, :, :0], 300, None), "no dimension of size 0"),
        (lambda k: (k.int(), k.int(), 300, None), "give one dtype for all"),
        (lambda k: (k, k.to("meta"), 300, None), "give all tensors on one device"),
        (lambda k: (k.to("meta"), k.to("meta"), 300, None), "give all tensors on one device"),
        (lambda k: (k, None, 300, None), "values is a NoneType"),
        (lambda k: (k, k, 300.5, None), "num_seen=300.5 is no whole number"),
        (lambda k: (k, k, True, None), "num_seen=True is no whole number"),
        (lambda k: (k, k, 199, None), "num_seen=199 does not fit 200 tokens; give a number from 200 to"),
        (lambda k: (k, k, (1 << 30) + 1, None), "from 200 to 1073741824"),
        (lambda k: (k, k, 300, torch.arange(199)), "positions=.* do not fit; give int64"),
        (lambda k: (k, k, 300, torch.arange(200.0)), "do not fit"),
        (lambda k: (k, k, 300, list(range(200))), "do not fit"),
        (lambda k: (k, k, 300, torch.arange(101, 301)), "positions do not ascend within 0 to 299; give ascending"),
        (lambda k: (k, k, 300, torch.arange(-1, 199)), "positions do not ascend"),
        (lambda k: (k, k, 300, torch.arange(200).flip(0)), "positions do not ascend"),
    ],
)
def test_load_tokens_refuses_what_does_not_fit_and_stays_empty(
    x: Inputs, change: Callable[[Tensor], tuple[Any, ...]], message: str
) -> None:
    cache = LayerCache(RocketKVConfig(**SMALL))
    keys, values, num_seen, positions = change(x.part(0, 200).key)
    with pytest.raises(InputError, match=message):
        cache.load_tokens(keys, values, num_seen=num_seen, positions=positions)
    assert (cache.num_seen, cache.kv_bytes, cache.working) == (0, 0, None)
    cache.load_tokens(*x.part(0, 200)[1:], num_seen=np.int64(300))
    assert cache.row_seen == [300, 300]


def test_loaded_tokens_keep_their_positions(x: Inputs) -> None:
    at = torch.arange(0, 600, 3).int()
    for positions in (at, torch.stack([at, at + 1]).expand(2, 2, 200)):
        cache = LayerCache(RocketKVConfig(**SMALL))
        cache.load_tokens(*x.part(0, 200)[1:], num_seen=700, positions=positions)
        assert torch.equal(cache.positions, positions.expand(2, 2, 200).long())
        cache.decode(*x.part(200, 201))
        assert (cache.positions[..., -1] == 700).all()
    cache = LayerCache(RocketKVConfig(**SMALL, mode="multi_turn"))
    cache.load_tokens(*x.part(0, 200)[1:], num_seen=200, positions=torch.arange(200))
    assert torch.equal(cache.positions[1, 1], torch.arange(200))
