"""Tests of further layers that attend to the cache of one layer: exact at a prompt, and reading only at a token."""

from typing import Any

import pytest
import torch

from inputs import Inputs, make_inputs
from rocketkv import InputError, LayerCache, RocketKVConfig, UnsupportedError, backends, ops
from rocketkv.ops import LogitTerms

SMALL: dict[str, Any] = {"dense_below": 0, "token_budget": 24, "window_size": 8, "kernel_size": 3}
METHODS: list[dict[str, Any]] = [
    *({"selection": name} for name in ("lowbit", "hybrid", "quest", "exact", "dense")),
    {"mode": "multi_turn"},
    {"mode": "multi_turn", "archive_on_host": True},
    {"kv_dtype": "int8"},
    {"selection": "sparq", "kv_dtype": "int8", "mode": "multi_turn"},
]


def other_query(x: Inputs, seed: int = 5) -> torch.Tensor:
    """Return queries of another layer."""
    return make_inputs(torch.Generator().manual_seed(seed), 2, 4, 2, x.query.shape[2], 16).query


@pytest.mark.parametrize("options", METHODS)
def test_a_token_is_read_alike_by_any_backend_and_nothing_is_appended(
    x: Inputs, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    config = RocketKVConfig(**SMALL, **options)
    query, padding = other_query(x), torch.tensor([0, 37])
    read, alone, reference = (LayerCache(config) for _ in range(3))
    for cache in (read, alone, reference):
        cache.prefill(*x.part(0, 200), padding=padding)
    for t in range(200, 215):
        token, reader = x.part(t, t + 1), query[:, :, t : t + 1]
        output = read.decode(*token)
        own_bytes = read.read_bytes
        assert torch.equal(output, alone.decode(*token))
        shared = [read.read_token(reader), read.read_token(reader)]
        assert torch.equal(*shared)
        assert own_bytes < read.read_bytes
        assert read.stats().full_read_bytes == 3 * alone.stats().full_read_bytes
        with monkeypatch.context() as patched:
            patched.setattr(backends, "BACKENDS", ())
            reference.decode(*token)
            torch.testing.assert_close(shared[0], reference.read_token(reader), atol=1e-5, rtol=1e-5)
    assert torch.equal(read.positions, alone.positions)
    assert read.num_seen == alone.num_seen == 215


def test_a_token_is_read_densely_where_all_is_kept(x: Inputs) -> None:
    cache = LayerCache(RocketKVConfig(token_budget=4096))
    cache.prefill(*x.part(0, 50))
    cache.decode(*x.part(50, 51))
    query = other_query(x)[:, :, :1]
    expected = ops.decode_densely(query, x.key[:, :, :51], x.value[:, :, :51], lengths=None, scale=0.25)
    torch.testing.assert_close(cache.read_token(query), expected)


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_prompt_is_read_as_it_was_before_stage_1(x: Inputs, mode: str) -> None:
    cache = LayerCache(RocketKVConfig(mode=mode, **SMALL))
    cache.keeps_prompt = True
    query, padding = other_query(x), torch.tensor([0, 37])
    cache.prefill(*x.part(0, 120), padding=padding)
    full = LayerCache(RocketKVConfig(token_budget=4096))
    expected = full.prefill(query[:, :, :120], x.key[:, :, :120], x.value[:, :, :120], padding=padding)
    torch.testing.assert_close(cache.read_prompt(query[:, :, :120]), expected)
    torch.testing.assert_close(cache.read_prompt(query[:, :, 119:120]), expected[:, :, -1:])
    copied = cache.copy()
    assert copied.prompt is None
    cache.decode(*x.part(120, 121))
    later = x.part(121, 140)
    cache.prefill(*later)
    own = LayerCache(RocketKVConfig(mode=mode, **SMALL))
    own.prefill(*x.part(0, 120), padding=padding)
    own.decode(*x.part(120, 121))
    output = own.prefill(query[:, :, 121:140], *later[1:])
    torch.testing.assert_close(cache.read_prompt(query[:, :, 121:140]), output)


def test_what_cannot_be_read_is_refused(x: Inputs) -> None:
    cache, query = LayerCache(RocketKVConfig(**SMALL)), other_query(x)
    token = query[:, :, :1]
    with pytest.raises(InputError, match="no prompt was kept; set keeps_prompt before the prefill"):
        cache.read_prompt(query)
    cache.prefill(*x.part(0, 100))
    with pytest.raises(InputError, match="no prompt was kept"):
        cache.read_prompt(query)
    with pytest.raises(InputError, match="only a query of one token, right after a decode step"):
        cache.read_token(token)
    cache.decode(*x.part(100, 101))
    with pytest.raises(InputError, match="only a query of one token"):
        cache.read_token(query[:, :, :2])
    for change, options in ((token, {"scale": 0.3}), (token[:, :2], {}), (token, {"terms": LogitTerms(None, 2.0)})):
        with pytest.raises(InputError, match="must have the heads, scale and soft cap of the step, and no sinks"):
            cache.read_token(change, **options)
    for bad, message in (
        (token[:1], r"query \[1, 4, 1, 16\] does not fit this cache; give \[2, a multiple of 2, T, 16\]"),
        (token[..., :8], "does not fit this cache"),
        (None, "query None does not fit this cache"),
        (token.double(), "query is torch.float64 on cpu, but the cache has torch.float32 on cpu; give that"),
    ):
        with pytest.raises(InputError, match=message):
            cache.read_token(bad)
    with pytest.raises(UnsupportedError, match="a compressed cache has no gradients"):
        cache.read_token(token.clone().requires_grad_())
