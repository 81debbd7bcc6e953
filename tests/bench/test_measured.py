"""Tests of what the benchmarks measure: caches without a prefill, geometries, the rest of a step."""

import pytest
import torch

from rocketkv.bench import model
from rocketkv.bench.decode import NoAttention
from rocketkv.bench.geometries import GEOMETRIES
from rocketkv.bench.tensors import dense_config, loaded_cache, random_tokens, sparse_config
from tiny import tiny_model


def test_loaded_caches_hold_what_a_prefill_would() -> None:
    keys = random_tokens(2, 3, 2000, 64, torch.float32)
    sparse = loaded_cache(sparse_config(128), keys, keys, 2000)
    assert int(sparse.num_stored.unique()) == sparse_config(128).budget_for(2000, 64).kept_tokens
    assert sparse.row_seen == [2000, 2000]
    dense = loaded_cache(dense_config(128), keys, keys, 2000)
    query, key = torch.randn(2, 9, 1, 64), torch.randn(2, 3, 1, 64)
    dense.decode(query, key, key)
    assert dense.read_bytes == 2001 * 2 * 3 * 2 * 64 * 4


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_geometry_is_a_model(name: str) -> None:
    geometry = GEOMETRIES[name]
    assert geometry.num_heads % geometry.num_kv_heads == 0
    billions = dict(zip(GEOMETRIES, (8.03, 1.236, 8.19, 0.268, 0.1345), strict=True))
    assert geometry.num_parameters / 1e9 == pytest.approx(billions[name], rel=0.003)


def test_the_rest_of_a_step_has_no_attention() -> None:
    layer = NoAttention(5)
    query = torch.randn(1, 4, 1, 8)
    assert torch.equal(layer.decode(query, query, query), torch.zeros_like(query))
    assert layer.num_seen == 6


def test_an_untied_embedding_is_not_read_by_a_step() -> None:
    tied, untied = tiny_model("llama", tie_word_embeddings=True), tiny_model("llama", tie_word_embeddings=False)
    assert model.sizes_of(tied).weight_bytes == model.sizes_of(untied).weight_bytes
    assert model.sizes_of(untied).num_kv_heads == 2
