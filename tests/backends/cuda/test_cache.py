"""Whole caches over the CUDA kernels, run on the CPU: buffers that grow, plans that change, turns and copies."""

from dataclasses import replace

import pytest
import torch

from backends.cuda.emulator import Emulated
from inputs import make_inputs
from rocketkv import Budget, LayerCache, RocketKVConfig, ragged
from rocketkv.backends import cuda
from scales import check, exact_inputs, scaled


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend takes tokens on the CPU."""
    monkeypatch.setattr(cuda, "decline", lambda spec: None)
    monkeypatch.setattr(cuda, "bind", Emulated.bind)


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize(
    ("selection", "kv_dtype"),
    [("lowbit", "auto"), ("hybrid", "auto"), ("quest", "auto"), ("exact", "auto"), ("lowbit", "int8")],
)
def test_a_cache_that_grows_decodes_as_by_the_reference(
    seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch, selection: str, kv_dtype: str, mode: str
) -> None:
    monkeypatch.setattr(ragged, "GROWTH", 4)
    inputs = make_inputs(seeded, num_tokens=140)
    budget = Budget(120, 4, 9, 50)
    config = RocketKVConfig(token_budget=64, selection=selection, budget=budget, mode=mode, kv_dtype=kv_dtype)
    caches = [LayerCache(replace(config, backend=backend)) for backend in ("cuda", "reference")]
    for cache in caches:
        cache.prefill(*inputs.part(0, 124))
    for i in range(124, 132):
        outputs = [cache.decode(*inputs.part(i, i + 1)) for cache in caches]
        torch.testing.assert_close(*outputs)
        assert caches[0].read_bytes == caches[1].read_bytes
    copied = caches[0].copy()
    read_bytes = copied.read_bytes
    caches[0].decode(*inputs.part(0, 1))
    assert copied.read_bytes == read_bytes
    if mode == "multi_turn":
        turns = [cache.prefill(*inputs.part(132, 138)) for cache in (copied, caches[1])]
        torch.testing.assert_close(*turns)
    torch.testing.assert_close(*(cache.decode(*inputs.part(138, 139)) for cache in (copied, caches[1])))


@pytest.mark.parametrize(("selection", "dtype"), [("lowbit", torch.bfloat16), ("hybrid", torch.float32)])
def test_scaling_keys_and_queries_changes_no_bit(seeded: torch.Generator, selection: str, dtype: torch.dtype) -> None:
    x = exact_inputs(seeded, 64, dtype, batch=1)
    options = {"token_budget": 24, "window_size": 8, "eviction": "keep_all", "selection": selection}
    check(x, scaled(x, seeded), turns=[(60, 6), (24, 6)], backend="cuda", **options)  # groups and blocks fill
