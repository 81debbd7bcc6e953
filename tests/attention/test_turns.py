"""Tests of later turns in both modes, of an archive on the host, and of a new start."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from caches import decode_all, strict
from inputs import make_inputs
from rocketkv import LayerCache
from rocketkv.selection import SELECTION_METHODS

pytestmark = pytest.mark.usefixtures("decoded_by")


def test_multi_turn_attends_densely_and_chooses_anew(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 700, 64)
    config = strict(token_budget=48, mode="multi_turn", window_size=16, kernel_size=7)
    turns, single = LayerCache(config), LayerCache(config)
    turns.prefill(*x.part(0, 500))
    decode_all(turns, x, 500, 520)
    second = turns.prefill(*x.part(520, 700))
    whole = single.prefill(*x)
    torch.testing.assert_close(second, whole[:, :, 520:], rtol=1e-4, atol=1e-5)
    assert torch.equal(turns.positions, single.positions)
    assert turns.num_seen == single.num_seen == 700


def test_single_turn_sees_what_is_left_and_evicts_again(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 500, 64)
    cache = LayerCache(strict(token_budget=48, window_size=16, kernel_size=7))
    cache.prefill(*x.part(0, 400))
    left = cache.positions[0]
    output = cache.prefill(*x.part(400, 500))
    for head in range(2):
        held = torch.cat([left[head], torch.arange(400, 500)])
        q, k, v = (a[0].double().numpy() for a in x)
        expected = oracle.dense(q[2 * head : 2 * head + 2, 400:], k[[head]][:, held], v[[head]][:, held])
        np.testing.assert_allclose(output[0, 2 * head : 2 * head + 2], expected, atol=1e-5)
        assert set(cache.positions[0, head].tolist()) <= set(held.tolist())
    assert cache.num_seen == 500
    assert int(cache.num_stored[0, 0]) < left.shape[1] + 100


@pytest.mark.parametrize(
    ("selection", "kv_dtype"), [*((name, "auto") for name in SELECTION_METHODS), ("lowbit", "int8"), ("dense", "int8")]
)
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 31])])
def test_an_archive_on_the_host_changes_nothing_but_where_tokens_lie(
    seeded: torch.Generator, padding: Tensor | None, selection: str, kv_dtype: str
) -> None:
    x = make_inputs(seeded, 2, 4, 2, 460, 64)
    config = strict(token_budget=64, mode="multi_turn", selection=selection, kv_dtype=kv_dtype)
    caches = [LayerCache(replace(config, archive_on_host=on_host), keep_queries=32) for on_host in (False, True)]

    def same(outputs: list[Tensor]) -> None:
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
        assert torch.equal(caches[0].positions, caches[1].positions)
        assert caches[0].read_bytes == caches[1].read_bytes

    same([cache.prefill(*x.part(0, 300), padding=padding) for cache in caches])
    same([decode_all(cache, x, 300, 350) for cache in caches])
    for cache in caches:
        cache.select_rows(torch.tensor([1, 0]))
    same([cache.prefill(*x.part(350, 400)) for cache in caches])
    same([decode_all(cache, x, 400, 410) for cache in caches])
    caches = [cache.copy() for cache in caches]
    same([decode_all(cache, x, 410, 420) for cache in caches])
    caches = [
        cache.fork(replace(config, archive_on_host=on_host))
        for cache, on_host in zip(caches, (True, False), strict=True)
    ]
    same([cache.prefill(*x.part(420, 450)) for cache in caches])
    caches = [
        cache.fork(replace(config, archive_on_host=on_host))
        for cache, on_host in zip(caches, (False, True), strict=True)
    ]
    same([decode_all(cache, x, 450, 460) for cache in caches])
    working = caches[1].working
    assert working is not None
    assert working.archive is not None
    assert working.source is None
    assert working.archive.max_length == 450
    assert working.num_pending == 10


def test_reset_forgets(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 300, 64)
    cache = LayerCache(strict(token_budget=48))
    first = cache.prefill(*x)
    cache.reset()
    assert (cache.num_seen, cache.kv_bytes, cache.read_bytes) == (0, 0, 0)
    assert torch.equal(cache.prefill(*x), first)
