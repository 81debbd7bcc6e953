"""Tests of right and wrong calls of a `LayerCache` in any order, against a model of the cache in plain lists.

ROCKETKV_TEST_EXAMPLES sets how many sequences of calls are tried; `make sanitize` tries fewer of them.
"""

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from plain_rows import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, Model, Row, attention, positions_of
from rocketkv import LayerCache, RocketKVConfig
from rocketkv.errors import RocketKVError

WINDOW, MOST_CACHES = 4, 3
METHODS = [("peak", "lowbit"), ("snapkv", "hybrid"), ("snapkv", "dense"), ("streaming_llm", "dense"), ("peak", "quest")]
EVERYTHING = 4096  # a budget for more tokens than any row here gets
MODES = st.sampled_from(["single_turn", "multi_turn"])
BUDGETS = st.sampled_from([EVERYTHING, 8, 20])


# Each takes the cache, fitting tensors for one more token, and the numbers of tokens that its rows have seen.
WRONG: dict[str, Any] = {
    "a prompt of another width": lambda c, x, seen: c.prefill(*(a[..., :8] for a in x)),
    "a token of another batch": lambda c, x, seen: c.decode(*(torch.cat([a, a]) for a in x)),
    "a token of another dtype": lambda c, x, seen: c.decode(*(a.half() for a in x)),
    "a prompt of padding alone": lambda c, x, seen: c.prefill(*x, padding=torch.ones(len(x[0]), dtype=torch.int64)),
    "a value that is missing": lambda c, x, seen: c.decode(*x[:2], None),
    "a scale that is no number": lambda c, x, seen: c.decode(*x, scale=float("nan")),
    "two tokens at once": lambda c, x, seen: c.decode(*(torch.cat([a, a], 2) for a in x)),
    "a row that is not there": lambda c, x, seen: c.select_rows(torch.tensor([len(seen)])),
    "no rows": lambda c, x, seen: c.select_rows(torch.tensor([], dtype=torch.int64)),
    "back to more than was seen": lambda c, x, seen: c.rewind(c.num_seen + 1, [n + 1 for n in seen] or [1]),
    "back to nothing": lambda c, x, seen: c.rewind(0, [0] * max(1, len(seen))),
    "a fork by no configuration": lambda c, x, seen: c.fork(None),
}


class AnyOrder(RuleBasedStateMachine):
    """A state machine over up to three caches, each beside its model."""

    @initialize(
        mode=MODES,
        budget=BUDGETS,
        method=st.sampled_from(METHODS),
        kv_dtype=st.sampled_from(["auto", "auto", "int8"]),
        backend=st.sampled_from(["auto", "reference"]),
        batch=st.integers(1, 3),
        seed=st.integers(0, 1 << 16),
    )
    def begin(
        self, mode: str, budget: int, method: tuple[str, str], kv_dtype: str, backend: str, batch: int, seed: int
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"mode": mode, "token_budget": budget, "kv_dtype": kv_dtype, "backend": backend}
        options["archive_on_host"] = mode == "multi_turn" and seed % 2 == 1
        config = self.config(method, **options)
        self.live = [(LayerCache(config, keep_queries=WINDOW if mode == "multi_turn" else 0), Model(config))]
        self.prefill(0, 30, batch, batch > 1)

    def config(self, method: tuple[str, str], **options: Any) -> RocketKVConfig:
        eviction, selection = method
        more = {"window_size": WINDOW, "kernel_size": 3, "dense_below": 0}
        return RocketKVConfig(eviction=eviction, selection=selection, **more, **options)

    def tokens(self, batch: int, count: int) -> list[Tensor]:
        heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        return [torch.randn(batch, n, count, HEAD_DIM, generator=self.generator) for n in heads]

    def pick(self, which: int) -> tuple[LayerCache, Model]:
        return self.live[which % len(self.live)]

    @rule(which=st.integers(0, 2), count=st.integers(1, 40), batch=st.integers(1, 3), padded=st.booleans())
    def prefill(self, which: int, count: int, batch: int, padded: bool) -> None:
        cache, model = self.pick(which)
        is_first = not model.rows
        rows = model.rows or [Row() for _ in range(batch)]
        query, key, value = self.tokens(len(rows), count)
        padding = torch.randint(count, (len(rows),), generator=self.generator) if padded else None
        output = cache.prefill(query, key, value, padding=padding)
        before, after = model.kept, positions_of(cache)
        for i, row in enumerate(rows):
            pad, seen = 0 if padding is None else int(padding[i]), len(row)
            row.add(key[i, :, pad:], value[i, :, pad:])
            sees_all = is_first or model.config.mode == "multi_turn"
            past = [list(range(seen))] * NUM_KV_HEADS if sees_all else before[i]
            expected = attention(query[i, :, pad:], row, past, count - pad)
            tolerance = {"rtol": 1e-3, "atol": 1e-4} if is_first else model.tolerance  # a first prompt is exact
            torch.testing.assert_close(output[i, :, pad:], expected, **tolerance)
            assert not output[i, :, :pad].any()
            for head in range(NUM_KV_HEADS):
                may_stay = {*past[head], *range(seen, len(row))}
                assert set(after[i][head]) <= may_stay
                assert after[i][head][-1] == len(row) - 1
                if model.config.eviction in ("peak", "snapkv"):
                    window = min(WINDOW, count - pad)
                    assert after[i][head][-window:] == list(range(len(row) - window, len(row)))
                if len(row) <= model.config.token_budget:
                    assert set(after[i][head]) == may_stay
        model.rows, model.kept, model.awaits_prompt = rows, after, False
        model.num_seen, model.num_decoded = model.num_seen + count, 0

    @rule(which=st.integers(0, 2), count=st.integers(1, 12))
    def decode(self, which: int, count: int) -> None:
        cache, model = self.pick(which)
        if model.awaits_prompt:
            with pytest.raises(RocketKVError, match="nothing was prefilled"):
                cache.decode(*self.tokens(max(1, len(model.rows)), 1))
            return
        for _ in range(count):
            query, key, value = self.tokens(len(model.rows), 1)
            output = cache.decode(query, key, value)
            model.num_seen, model.num_decoded = model.num_seen + 1, model.num_decoded + 1
            assert output.isfinite().all()
            assert cache.read_bytes > 0
            for i, row in enumerate(model.rows):
                row.add(key[i], value[i])
                if model.attends_to_all(row):
                    expected = attention(query[i], row, model.kept[i], 1)
                    torch.testing.assert_close(output[i], expected, **model.tolerance)
                for head in model.kept[i]:
                    head.append(len(row) - 1)

    @rule(which=st.integers(0, 2))
    def copy(self, which: int) -> None:
        cache, model = self.pick(which)
        self.live = [*self.live, (cache.copy(), model.copy())][-MOST_CACHES:]

    @rule(which=st.integers(0, 2), mode=MODES, budget=BUDGETS, method=st.sampled_from(METHODS))
    def fork(self, which: int, mode: str, budget: int, method: tuple[str, str]) -> None:
        cache, model = self.pick(which)
        options: dict[str, Any] = {"mode": mode, "token_budget": budget, "kv_dtype": model.config.kv_dtype}
        config = self.config(method, **options)
        has_queries = not model.awaits_prompt and model.num_decoded == 0
        try:
            fork = cache.fork(config)
        except RocketKVError:  # of a single_turn cache none, and a single_turn fork of first prompts only
            assert model.config.mode == "single_turn" or mode == "single_turn"
            return
        assert model.config.mode == "multi_turn"
        forked = model.copy()
        forked.config, forked.num_decoded, forked.awaits_prompt = config, 0, not has_queries
        if has_queries:
            forked.kept = positions_of(fork)
            for row, kept in zip(forked.rows, forked.kept, strict=True):
                assert all(set(head) <= set(range(len(row))) for head in kept)
        self.live = [*self.live, (fork, forked)][-MOST_CACHES:]

    @rule(which=st.integers(0, 2), rows=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def select_rows(self, which: int, rows: list[int]) -> None:
        cache, model = self.pick(which)
        if model.awaits_prompt:
            with pytest.raises(RocketKVError, match="nothing was prefilled"):
                cache.select_rows(torch.tensor(rows))
            return
        rows = [row % len(model.rows) for row in rows]
        cache.select_rows(torch.tensor(rows))
        before = model.copy()
        model.rows = [before.rows[row].first(len(before.rows[row])) for row in rows]
        model.kept = [[list(head) for head in before.kept[row]] for row in rows]

    @rule(which=st.integers(0, 2), count=st.just(0) | st.integers(1, 12), unevenly=st.booleans())
    def rewind(self, which: int, count: int, unevenly: bool) -> None:
        cache, model = self.pick(which)
        count = count or max(1, model.num_decoded)  # 0 stands for all decoded tokens
        if not model.rows or min(map(len, model.rows)) <= count:
            return
        dropped = [max(0, count - 5 * i) if unevenly else count for i in range(len(model.rows))]
        left = [len(row) - num for row, num in zip(model.rows, dropped, strict=True)]
        over_decoded = not model.awaits_prompt and min(dropped) == count <= model.num_decoded
        if not over_decoded and model.config.mode == "single_turn":
            with pytest.raises(RocketKVError, match="decoded since its last prompt only"):
                cache.rewind(model.num_seen - count, left)
            return
        cache.rewind(model.num_seen - count, left)
        model.rows = [row.first(num) for row, num in zip(model.rows, left, strict=True)]
        model.num_seen -= count
        if over_decoded:
            model.kept = [[head[:-count] for head in row] for row in model.kept]
            model.num_decoded -= count
        else:
            model.kept, model.num_decoded, model.awaits_prompt = [], 0, True

    @rule(which=st.integers(0, 2))
    def reset(self, which: int) -> None:
        which %= len(self.live)
        cache, model = self.live[which]
        cache.reset()
        self.live[which] = cache, Model(model.config)

    @precondition(lambda self: any(model.rows for _, model in self.live))
    @rule(which=st.integers(0, 2), name=st.sampled_from(sorted(WRONG)))
    def wrong(self, which: int, name: str) -> None:
        cache, model = self.pick(which)
        if model.rows:
            before = cache.kv_bytes, cache.read_bytes, cache.just_prefilled
            with pytest.raises(RocketKVError):
                WRONG[name](cache, self.tokens(len(model.rows), 1), [len(row) for row in model.rows])
            assert (cache.kv_bytes, cache.read_bytes, cache.just_prefilled) == before

    @invariant()
    def each_cache_is_its_model(self) -> None:
        for cache, model in getattr(self, "live", []):
            assert cache.num_seen == model.num_seen
            if not model.rows:
                assert cache.kv_bytes == cache.read_bytes == 0
                continue
            assert cache.row_seen == [len(row) for row in model.rows]
            assert cache.awaits_prompt == model.awaits_prompt
            assert cache.just_prefilled == (not model.awaits_prompt and model.num_decoded == 0)
            if not model.awaits_prompt:
                assert positions_of(cache) == model.kept
                if model.config.token_budget == EVERYTHING:
                    everything = [[list(range(len(row)))] * NUM_KV_HEADS for row in model.rows]
                    assert model.kept == everything

    def teardown(self) -> None:
        """Check the archive: in a next turn, every multi_turn cache attends to all tokens that its rows have seen."""
        for which, (_, model) in enumerate(getattr(self, "live", [])):
            if model.rows and model.config.mode == "multi_turn":
                self.prefill(which, 3, 1, False)


@pytest.mark.filterwarnings("ignore:a row has grown so long")  # true of the smallest budgets; test_budgets.py holds it
class TestAnyOrder(AnyOrder.TestCase):  # type: ignore[misc, valid-type] # hypothesis makes it
    settings = settings(
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # a failing example is not shortened, because that takes minutes
        max_examples=int(os.environ.get("ROCKETKV_TEST_EXAMPLES", "80")),
        stateful_step_count=25,
        suppress_health_check=list(HealthCheck),
    )
