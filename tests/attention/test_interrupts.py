"""Tests that a call which breaks off has either taken effect completely or not at all."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import rocketkv
from caches import SMALL, Call, assert_same, token
from inputs import Inputs, make_inputs
from rocketkv import ConfigError, LayerCache, RocketKVConfig, UnsupportedError
from rocketkv.eviction import SnapKV


class Flaky(SnapKV):
    """An object that raises once it is told to."""

    error: BaseException | None = None

    def keep(self, *args: Any, **options: Any) -> Any:
        if Flaky.error is not None:
            raise Flaky.error
        return super().keep(*args, **options)


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_prompt_that_broke_off_can_be_given_again(
    x: Inputs, monkeypatch: pytest.MonkeyPatch, mode: str, error: type[BaseException], kv_dtype: str
) -> None:
    options: dict[str, Any] = {**SMALL, "token_budget": 10, "mode": mode, "kv_dtype": kv_dtype, "eviction": Flaky(8, 7)}
    cache, expected = (LayerCache(RocketKVConfig(**options)) for _ in range(2))
    for start, stop in ((0, 200), (203, 222)):
        monkeypatch.setattr(Flaky, "error", error())
        with pytest.raises(error):
            cache.prefill(*x.part(start, stop))
        monkeypatch.setattr(Flaky, "error", None)
        assert torch.equal(*(c.prefill(*x.part(start, stop)) for c in (cache, expected)))
        assert torch.equal(*(c.decode(*x.part(stop, stop + 1)) for c in (cache, expected)))
    assert_same(cache, expected, x)


def test_a_prompt_whose_plan_is_refused_can_be_followed_by_another(x: Inputs) -> None:
    cache = LayerCache(RocketKVConfig(**SMALL, recent_tokens=19))
    expected = cache.copy()
    with pytest.raises(ConfigError, match="but a step attends to top_k"):
        cache.prefill(*x.part(0, 200))
    assert (cache.num_seen, cache.working, cache.plan) == (0, None, None)
    assert expected.num_seen == 0


def test_a_step_that_no_backend_takes_counts_no_token(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 2, 1, 50, 257)
    cache = LayerCache(RocketKVConfig(token_budget=64, backend="cpp"))
    cache.prefill(*x.part(0, 40))
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="backend='cpp' declines this cache"):
            cache.decode(*x.part(40, 41))
    assert cache.num_seen == 40
    assert cache.row_seen == [40]


class Interrupting:
    """A context that raises KeyboardInterrupt at the n-th possible point inside this package's code."""

    def __init__(self, point: int) -> None:
        self.point = point
        self.passed = 0
        self.folder = str(Path(rocketkv.__file__).parent)

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(self.folder):
            return
        if self.passed == self.point:
            sys.setprofile(None)
            raise KeyboardInterrupt
        self.passed += 1


CALLS: dict[str, Call] = {
    "prefill": lambda c, x: c.prefill(*x.part(203, 222), padding=torch.tensor([3, 0])),
    "decode": lambda c, x: c.decode(*token(x)),
    "decode and tell": lambda c, x: (setattr(c, "trace", True), c.decode(*token(x))),
    "select_rows": lambda c, x: c.select_rows(torch.tensor([1, 0])),
}


def interrupted_at(point: int, cache: LayerCache, call: Call, x: Inputs) -> tuple[LayerCache, int]:
    """Return a copy of the cache after a call interrupted at a point, and how many points the call passed."""
    copied, interrupting = cache.copy(), Interrupting(point)
    sys.setprofile(interrupting)
    try:
        call(copied, x)
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return copied, interrupting.passed


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "multi_turn", "selection": "hybrid"},
        {"mode": "multi_turn", "archive_on_host": True, "kv_dtype": "int8"},
        {"selection": "dense", "eviction": "keep_all"},
    ],
    ids=str,
)
def test_an_interrupted_call_was_made_or_was_not(x: Inputs, backend: str, options: dict[str, Any], call: str) -> None:
    cache = LayerCache(RocketKVConfig(**SMALL, backend=backend, **options))
    cache.prefill(*x.part(0, 200), padding=torch.tensor([0, 40]))
    for t in range(200, 203):
        cache.decode(*x.part(t, t + 1))
    made = cache.copy()
    CALLS[call](made, x)
    _, num_points = interrupted_at(-1, cache, CALLS[call], x)
    assert num_points > 20
    for point in {*range(len(str(options)) % 7, num_points, 1 + num_points // 12), num_points - 1, num_points - 2}:
        interrupted, _ = interrupted_at(point, cache, CALLS[call], x)
        expected = made if torch.equal(interrupted.working.seen, made.working.seen) else cache
        assert_same(interrupted, expected.copy(), x)
