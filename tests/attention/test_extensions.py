"""Tests of policies and methods from outside: they work, and nonsense that they return is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from caches import SMALL, assert_same, decode_all, strict
from inputs import Inputs, make_inputs
from rocketkv import Budget, ConfigError, InputError, LayerCache, RocketKVConfig
from rocketkv.budget import Split
from rocketkv.eviction import KeepAll
from rocketkv.selection import SELECTION_METHODS, Hybrid


class HeadsOfTheirOwn(KeepAll):
    """An eviction policy from outside, with which each head keeps another number of tokens."""

    def keep(self, query: Tensor, keys: Tensor, *, lengths: Tensor, **_: Any) -> Tensor:
        slots = torch.arange(keys.shape[2])
        first = torch.tensor([10, 150])[: keys.shape[1]]
        return (slots >= lengths[..., None] - 40) & (slots < lengths[..., None]) | (slots < first[:, None])


@pytest.mark.usefixtures("decoded_by")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize(
    ("selection", "kv_dtype"), [*((name, "auto") for name in SELECTION_METHODS), ("lowbit", "int8"), ("hybrid", "int8")]
)
def test_heads_may_keep_different_numbers(seeded: torch.Generator, mode: str, selection: str, kv_dtype: str) -> None:
    x = make_inputs(seeded, 1, 4, 2, 330, 64)
    options = {"mode": mode, "selection": selection, "kv_dtype": kv_dtype, "budget": Budget(60, 2, 32, 30)}
    config = strict(token_budget=48, eviction=HeadsOfTheirOwn(), **options)
    cache = LayerCache(config)
    cache.prefill(*x.part(0, 300))
    assert cache.num_stored.tolist() == [[50, 190]]
    together = decode_all(cache, x, 300, 310)
    second = cache.prefill(*x.part(310, 320))
    together = torch.cat([together, second, decode_all(cache, x, 320, 330)], dim=2)
    assert torch.isfinite(together).all()
    for head in range(2):  # each head is what it is alone
        first = [10, 150][head]

        class Alone(KeepAll):
            def keep(self, query: Tensor, keys: Tensor, *, lengths: Tensor, first: int = first, **_: Any) -> Tensor:
                slots = torch.arange(keys.shape[2])
                return (slots >= lengths[..., None] - 40) & (slots < lengths[..., None]) | (slots < first)

        alone = LayerCache(strict(token_budget=48, eviction=Alone(), **options))
        y = Inputs(x.query[:, 2 * head : 2 * head + 2], x.key[:, [head]], x.value[:, [head]])
        alone.prefill(*y.part(0, 300))
        tokens = decode_all(alone, y, 300, 310)
        tokens = torch.cat([tokens, alone.prefill(*y.part(310, 320)), decode_all(alone, y, 320, 330)], dim=2)
        torch.testing.assert_close(together[:, 2 * head : 2 * head + 2], tokens, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("decoded_by")
def test_a_selection_method_from_outside_works(seeded: torch.Generator) -> None:
    class OtherHybrid(Hybrid):
        calls = 0

        def logits(self, *args: Any, **options: Any) -> Tensor:
            self.calls += 1
            return super().logits(*args, **options)

    x = make_inputs(seeded, 1, 4, 2, 210, 64)
    method = OtherHybrid()
    cache = LayerCache(strict(token_budget=48, selection=method))
    same = LayerCache(strict(token_budget=48, selection="hybrid"))
    for c in (cache, same):
        c.prefill(*x.part(0, 200))
    torch.testing.assert_close(decode_all(cache, x, 200, 210), decode_all(same, x, 200, 210), rtol=1e-4, atol=1e-5)
    assert method.calls == 10


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda keys: torch.ones(keys.shape[:3]), r"returned torch.float32 \[1, 2, 200\]; return torch.bool"),
        (lambda keys: torch.ones(1, 2, 7, dtype=torch.bool), r"returned torch.bool \[1, 2, 7\]; return"),
        (lambda keys: torch.zeros(keys.shape[:3], dtype=torch.bool), "left a row without tokens; keep at least one"),
    ],
)
def test_policies_that_return_nonsense_are_refused(
    seeded: torch.Generator, returned: Callable[[Tensor], Tensor], message: str
) -> None:
    class Nonsense(KeepAll):
        def keep(self, query: Tensor, keys: Tensor, **_: Any) -> Tensor:
            return returned(keys)

    with pytest.raises(InputError, match=message):
        LayerCache(strict(token_budget=16, window_size=8, eviction=Nonsense())).prefill(*make_inputs(seeded))


@pytest.mark.parametrize("returned", ["all", 1, torch.ones(2, 2, 200, dtype=torch.bool, device="meta")])
def test_a_policy_of_ones_own_that_answers_amiss_changes_nothing(x: Inputs, returned: object) -> None:
    class Nonsense(KeepAll):
        def keep(self, *args: Any, **options: Any) -> Any:
            return returned

    cache = LayerCache(RocketKVConfig(**SMALL, eviction=Nonsense()))
    with pytest.raises(
        InputError, match=r"Nonsense.keep returned .*; return torch.bool \[2, 2, 200\], on cpu, or None"
    ):
        cache.prefill(*x.part(0, 200))
    assert (cache.num_seen, cache.working) == (0, None)


@pytest.mark.parametrize("returned", ["all", torch.ones(2, 2, 2, 7), torch.ones(2, 2, 2, 201, dtype=torch.int64)])
def test_a_method_of_ones_own_that_answers_amiss_decodes_nothing(x: Inputs, returned: object) -> None:
    class Nonsense(Hybrid):
        answers: Any = None

        def logits(self, *args: Any, **options: Any) -> Any:
            return super().logits(*args, **options) if self.answers is None else self.answers

    method = Nonsense()
    cache = LayerCache(RocketKVConfig(**SMALL, selection=method))
    cache.prefill(*x.part(0, 200))
    untouched = cache.copy()
    method.answers = returned
    with pytest.raises(InputError, match=r"Nonsense\.logits returned .*; return torch.float32"):
        cache.decode(*x.part(200, 201))
    method.answers = None
    assert_same(cache, untouched, x)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((1, 4, 8), r"Mine.split returned \(1, 4, 8\); return a rocketkv.budget.Split"),
        (Split(0, 4, 8), "Mine.split: page_size=0 is too small; give 1 or more"),
        (Split(1, -1, 8), "Mine.split: num_channels=-1 is too small"),
        (Split(1, 4, 7.5), "Mine.split: top_k=7.5 is not a whole number"),
        (Split(1, 17, 8), "num_channels=17 is more than head_dim=16"),
    ],
)
def test_a_split_of_ones_own_that_cannot_be_is_refused(x: Inputs, split: Any, message: str) -> None:
    class Mine(Hybrid):
        def split(self, *args: Any) -> Any:
            return split

    cache = LayerCache(RocketKVConfig(**SMALL, selection=Mine()))
    with pytest.raises(ConfigError, match=message):
        cache.prefill(*x.part(0, 200))
    assert (cache.num_seen, cache.working) == (0, None)
