"""Bounds of pages, built, extended and scored, against plain loops."""

import numpy as np
import pytest
import torch

import oracle
from inputs import SIZES, arrays, make_inputs, poisoned
from rocketkv import ops
from rocketkv.index import PageIndex


@pytest.mark.parametrize(("size", "group", "head_dim"), SIZES)
@pytest.mark.parametrize("page_size", [1, 2, 3, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_page_logits(
    seeded: torch.Generator, size: int, group: int, head_dim: int, page_size: int, weighted: bool
) -> None:
    x = make_inputs(seeded, 1, 2 * group, 2, size, head_dim)
    lengths = torch.full((1, 2), size)
    pages = PageIndex(x.key, lengths, torch.tensor([page_size]), weighted=weighted)
    query = x.query[:, :, -1].reshape(1, 2, group, head_dim)
    num_channels = max(1, head_dim // 3)
    hybrid = ops.score_tokens(
        ops.hybrid_logits(
            query,
            pages.bounds,
            page_size=pages.page_size,
            num_tokens=size,
            num_channels=torch.tensor([num_channels]),
            scale=head_dim**-0.5,
            spread=pages.spread,
        ),
        lengths,
    )
    quest = ops.score_tokens(
        ops.bound_logits(query, pages.bounds, page_size=pages.page_size, num_tokens=size, scale=head_dim**-0.5), lengths
    )
    for head in range(2):
        q, k = arrays(query[0, head], x.key[0, head])
        spread = oracle.spread(k, 32 * page_size) if weighted and size > 1 else 1.0
        expected = oracle.hybrid_token_scores(q, k, page_size, num_channels, spread)
        np.testing.assert_allclose(hybrid[0, head], expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(quest[0, head], oracle.quest_token_scores(q, k, page_size), rtol=1e-3, atol=1e-6)


def test_quest_bounds_every_dot_product_from_above(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 8, 2, 101, 64)
    pages = PageIndex(x.key, torch.full((1, 2), 101), torch.tensor([4]))
    query = torch.randn(1, 2, 4, 64, generator=seeded)
    bound = ops.bound_logits(query, pages.bounds, page_size=pages.page_size, num_tokens=101, scale=1.0)
    assert (bound >= query @ x.key.transpose(2, 3) - 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_extended_index_equals_a_rebuilt_one_at_every_step(seeded: torch.Generator, dtype: torch.dtype) -> None:
    x = make_inputs(seeded, 3, 4, 2, 150, 32, dtype)
    page_size = torch.tensor([1, 3, 4])
    lengths = torch.tensor([[10, 12], [3, 3], [7, 1]])
    grown = PageIndex(x.key[:, :, :12], lengths, page_size, weighted=True)
    everything = poisoned(x.key, lengths)
    for step in range(100):
        key = x.key[:, :, 20 + step : 21 + step]
        for row in range(3):
            for head in range(2):
                everything[row, head, lengths[row, head]] = key[row, head, 0]
        grown.extend(key, lengths)
        lengths = lengths + 1
        rebuilt = PageIndex(everything, lengths, page_size, weighted=True)
        for row in range(3):
            for head in range(2):
                pages = -(-int(lengths[row, head]) // int(page_size[row]))
                mine, theirs = (index.bounds[row, head].transpose(0, 1).flatten(1) for index in (grown, rebuilt))
                assert torch.equal(mine[:, :pages], theirs[:, :pages])
        assert torch.equal(grown.spread, rebuilt.spread)


def test_pages_of_one_token_are_stored_once(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 2, 2, 500, 64)
    lengths = torch.full((1, 2), 500)
    single = PageIndex(x.key, lengths, torch.tensor([1]))
    pairs = PageIndex(x.key, lengths, torch.tensor([2]))
    assert single.num_bytes < 1.2 * x.key.nbytes
    assert pairs.num_bytes < 1.3 * x.key.nbytes


def test_a_zero_query_chooses_without_nan(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 2, 1, 50, 64)
    lengths = torch.full((1, 1), 50)
    pages = PageIndex(x.key, lengths, torch.tensor([2]))
    logits = ops.hybrid_logits(
        torch.zeros(1, 1, 2, 64),
        pages.bounds,
        page_size=pages.page_size,
        num_tokens=50,
        num_channels=torch.tensor([8]),
        scale=0.125,
    )
    scores = ops.score_tokens(logits, lengths)
    torch.testing.assert_close(scores, torch.full((1, 1, 50), 1 / 50))


def test_pages_are_built_from_sizes_and_lengths_that_are_views(seeded: torch.Generator) -> None:
    keys = torch.randn(3, 2, 90, 16, generator=seeded)
    sizes, lengths = torch.tensor([[2, 9], [3, 9], [4, 9]]), torch.tensor([[90, 0, 50], [7, 0, 8], [33, 0, 90]])
    built = PageIndex(keys, lengths[:, ::2], sizes[:, 0])
    plain = PageIndex(keys, lengths[:, ::2].clone(), sizes[:, 0].clone())
    assert torch.equal(built.bounds, plain.bounds)
