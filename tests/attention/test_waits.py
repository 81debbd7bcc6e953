"""Tests that the host does not wait for the device while a prompt is taken in.

Tensors on torch's `meta` device have no numbers, so an operation that needs one on the host fails. A copy from the host
must not wait either.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rocketkv import LayerCache, RocketKVConfig
from rocketkv.backends import triton
from rocketkv.eviction import Peak
from rocketkv.ops import LogitTerms

META = torch.device("meta")


class Waiting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its classes untyped
    """A mode that fails where the host would wait for a copy from it to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[0] if func.overloadpacket == torch.ops.aten._to_copy else args[1]
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            assert not (waits and source.device.type == "cpu" and result.device == META), "a copy to the device waits"
        return result


class Making(TorchFunctionMode):
    """A mode that fails where numbers of the host become a tensor on the device, for which the host would wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor):
            assert torch.device((kwargs or {}).get("device") or "cpu") != META, f"{func.__name__} waits"
        return func(*args, **(kwargs or {}))


def tokens(num_tokens: int, num_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query of two rows, and keys and values of two KV heads, on the meta device."""
    query, key = (torch.empty(2, heads, num_tokens, 16, device=META, dtype=torch.bfloat16) for heads in (num_heads, 2))
    return query, key, key


@pytest.fixture(autouse=True)
def _meta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rocketkv.attention.check_tokens", lambda *_: None)  # it refuses the meta device


@pytest.mark.parametrize("padding", [None, [0, 40]], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "multi_turn"},
        {"eviction": "snapkv", "selection": "hybrid"},
        {"eviction": "streaming_llm", "selection": "quest", "mode": "multi_turn"},
        {"eviction": "keep_all", "selection": "sparq"},
        {"kv_dtype": "int8", "dense_below": 0},
        {"selection": "dense", "token_budget": 1000},
    ],
    ids=str,
)
def test_no_prompt_and_no_later_turn_waits(options: dict[str, Any], padding: list[int] | None) -> None:
    cache = LayerCache(RocketKVConfig(**{"token_budget": 40, "window_size": 8, **options}), keep_queries=8)
    given = None if padding is None else torch.tensor(padding)
    with Making(), Waiting():  # type: ignore[no-untyped-call]
        cache.prefill(*tokens(500), padding=given)
        cache.prefill(*tokens(60), padding=given, terms=LogitTerms(None, 5.0))
        assert cache.working is not None
        assert cache.working.lengths.device == META
        assert cache.row_seen == [560, 560 - 2 * sum(padding or [])]


@pytest.mark.parametrize("selection", ["lowbit", "hybrid"])
def test_the_kernels_for_gpus_are_started_without_a_wait(monkeypatch: pytest.MonkeyPatch, selection: str) -> None:
    launch = pytest.importorskip("rocketkv.backends.triton.launch")
    started: list[str] = []
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: started.append(self.kernel.fn.__name__))
    monkeypatch.setattr(triton, "DEVICES", ("meta",))
    monkeypatch.setattr(triton, "decline", lambda spec: None)
    cache = LayerCache(RocketKVConfig(token_budget=40, window_size=8, selection=selection))
    with Making(), Waiting():  # type: ignore[no-untyped-call]
        cache.prefill(*tokens(500), padding=torch.tensor([0, 40]))
    assert started[:2] == ["sum_window_kernel", "score_window_kernel"]
    assert len(started) == 4  # and two that build the index


class Own(Peak):
    """An eviction policy of one's own, whose masks may keep any number of tokens."""

    def keep(self, *args: Any, **options: Any) -> Tensor | None:
        return super().keep(*args, **options)


def test_the_mask_of_a_policy_of_ones_own_is_read() -> None:
    cache = LayerCache(RocketKVConfig(token_budget=40, window_size=8, eviction=Own(8, 7)))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        cache.prefill(*tokens(500))
