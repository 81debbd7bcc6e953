"""Tests of keys and logits that are NaN or infinite, and of ties."""

from itertools import product

import pytest
import torch

from caches import SMALL, token
from inputs import Inputs
from layers import DTYPES
from rocketkv import LayerCache, RocketKVConfig, ops


@pytest.mark.parametrize(
    ("selection", "kv_dtype", "number"),
    [
        (selection, *stored)
        for selection in ("dense", "exact", "quest", "sparq", "hybrid", "lowbit")
        for stored in (("auto", torch.nan), ("int8", torch.nan), ("int8", torch.inf))
        if (selection, stored[0]) != ("exact", "int8")  # which is refused
    ],
)
def test_a_key_channel_that_is_no_number_shows_in_every_output(
    x: Inputs, backend: str, selection: str, kv_dtype: str, number: float
) -> None:
    keys = x.key.clone()
    keys[..., 3] = number
    options = {"selection": selection, "kv_dtype": kv_dtype, "backend": backend}
    for dtype, num_tokens in product(DTYPES, (1, 7, 200)):
        cache = LayerCache(RocketKVConfig(**SMALL, **options))
        cache.load_tokens(*(a[:, :, :num_tokens].to(dtype) for a in (keys, x.value)), num_seen=num_tokens)
        output = cache.decode(*(a.to(dtype) for a in token(x)))
        assert output.isnan().all(), (dtype, num_tokens)


@pytest.mark.parametrize("selection", ["exact", "quest", "sparq", "hybrid", "lowbit"])
@pytest.mark.parametrize("at", [0, 70, 130, 199])
def test_a_token_whose_score_is_no_number_is_attended_to(x: Inputs, backend: str, selection: str, at: int) -> None:
    keys = x.key.clone()
    keys[:, :, at] = torch.nan
    cache = LayerCache(RocketKVConfig(**SMALL, selection=selection, backend=backend))
    cache.load_tokens(keys[:, :, :200], x.value[:, :, :200], num_seen=200)
    if selection in ("exact", "sparq", "lowbit"):  # the bounds of a page are those of its other tokens
        assert cache.decode(*token(x)).isnan().all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_an_infinite_logit_is_what_plain_torch_makes_of_it(x: Inputs, backend: str, number: float) -> None:
    keys = x.key.clone()
    keys[:, 0, :40, 3], keys[:, 1, 100:, 3] = number, number
    query = token(x).query.abs()
    cache = LayerCache(RocketKVConfig(**SMALL, selection="dense", eviction="keep_all", backend=backend))
    cache.load_tokens(keys[:, :, :200], x.value[:, :, :200], num_seen=200)
    output = cache.decode(query, *token(x)[1:])
    _, key, value = token(x)
    past = [torch.cat([a[:, :, :200], new], 2).repeat_interleave(2, 1) for a, new in ((keys, key), (x.value, value))]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *past)
    torch.testing.assert_close(output, expected, equal_nan=True)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
def test_equal_logits_have_equal_scores(group: int) -> None:
    for size in (1, 7, 43, 100, 257):
        for value in (0.0, 1.3, -7.7):
            logits = torch.full((1, 1, group, size + 1), value)
            logits[..., 0] = 2.5
            scores = ops.score_tokens(logits, torch.tensor([[size + 1]]))
            assert scores[0, 0, 1:].unique().numel() == 1
            torch.testing.assert_close(scores, logits.softmax(-1).mean(2))
