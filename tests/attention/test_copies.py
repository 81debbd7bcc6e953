"""Tests that copies are independent, and that threads which share a cache do no harm."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from caches import SMALL, assert_same, decode_all, prefilled, strict, token
from inputs import Inputs, make_inputs
from rocketkv import InputError, LayerCache, RocketKVConfig
from rocketkv.eviction import KeepAll
from rocketkv.selection import SELECTION_METHODS


@pytest.mark.usefixtures("decoded_by")
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_copy_goes_its_own_way(seeded: torch.Generator, mode: str) -> None:
    x = make_inputs(seeded, 1, 4, 2, 410, 64)
    for selection in SELECTION_METHODS:
        cache = LayerCache(strict(token_budget=48, mode=mode, selection=selection))
        cache.prefill(*x.part(0, 380))
        decode_all(cache, x, 380, 385)
        copied = cache.copy()
        expected = decode_all(cache, x, 385, 400)
        decode_all(copied, Inputs(-x.query, -x.key, -x.value), 385, 390)
        again = cache.copy()
        assert torch.equal(decode_all(cache, x, 400, 410), decode_all(again, x, 400, 410))
        assert cache.num_seen == 410
        assert copied.num_seen == 390
        assert expected.isfinite().all()


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize("inference", [False, True])
def test_every_way_to_copy_gives_an_independent_cache(x: Inputs, mode: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        cache = prefilled(x, mode=mode)
    for duplicate in (copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), LayerCache.copy):
        untouched, other = cache.copy(), duplicate(cache)
        other.decode(*(-a for a in token(x)))
        assert_same(cache.copy(), untouched, x)
        assert_same(duplicate(cache), cache.copy(), x)


def test_a_second_thread_is_refused_and_does_no_harm(x: Inputs) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(KeepAll):
        def keep(self, query: Tensor, keys: Tensor, **options: Any) -> None:
            entered.set()
            assert leave.wait(60)

    cache = LayerCache(RocketKVConfig(**SMALL, eviction=Slow()))
    thread = threading.Thread(target=lambda: cache.prefill(*x.part(0, 200)))
    thread.start()
    assert entered.wait(60)
    calls: list[Callable[[], Any]] = [
        lambda: cache.prefill(*x.part(0, 200)),
        lambda: cache.decode(*token(x)),
        lambda: cache.load_tokens(*x.part(0, 9)[1:], num_seen=9),
        lambda: cache.select_rows(torch.tensor([0])),
        lambda: cache.fork(cache.config),
        cache.copy,
        cache.reset,
    ]
    for call in calls:
        with pytest.raises(InputError, match="another thread is using this cache; use a cache in one thread at a time"):
            call()
    leave.set()
    thread.join()
    assert cache.row_seen == [200, 200]
    cache.decode(*x.part(200, 201))


def test_a_call_within_a_call_leaves_the_cache_reserved(x: Inputs) -> None:
    refused: list[Exception] = []

    class Copying(KeepAll):
        def keep(self, query: Tensor, keys: Tensor, **options: Any) -> None:
            cache.copy()
            thread = threading.Thread(target=reset)
            thread.start()
            thread.join()

    def reset() -> None:
        try:
            cache.reset()
        except InputError as error:
            refused.append(error)

    cache = LayerCache(RocketKVConfig(**SMALL, eviction=Copying()))
    cache.prefill(*x.part(0, 200))
    assert len(refused) == 1
    cache.user["thread"] = threading.get_ident()  # as an interrupted call may leave it
    cache.reset()
    assert cache.user == {}


def test_threads_that_share_a_cache_decode_each_token_or_are_refused(x: Inputs) -> None:
    cache = prefilled(x, token_budget=64)
    refused, foreign, steps = [], [], 300

    def decode() -> None:
        for _ in range(steps):
            try:
                cache.decode(*token(x))
            except InputError as error:
                refused.append(error)
            except Exception as error:
                foreign.append(error)

    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not foreign
    assert cache.num_seen == 203 + 3 * steps - len(refused)
    assert cache.row_seen == [cache.num_seen] * 2
    assert_same(cache, cache.copy(), x)
