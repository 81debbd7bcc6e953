"""Tests that an index which grew token by token equals one that is built anew, at all lengths."""

from typing import Any

import pytest
import torch

from rocketkv import LayerCache, RocketKVConfig

# Around the ends of a page, of a group of low-bit keys (64) and of a block of several.
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 511, 513]


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("selection", ["lowbit", "hybrid", "quest"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_index_that_grew_chooses_as_one_that_was_built(
    seeded: torch.Generator, selection: str, kv_dtype: str, backend: str, num_tokens: int
) -> None:
    """`select_rows` of all rows keeps the index; going back over a token drops it, so that the next step builds it."""
    options: dict[str, Any] = {"selection": selection, "kv_dtype": kv_dtype, "backend": backend, "recent_tokens": 0}
    config = RocketKVConfig(
        token_budget=32, window_size=4, kernel_size=3, dense_below=0, eviction="keep_all", **options
    )
    cache = LayerCache(config)
    cache.prefill(*torch.randn(3, 2, 2, num_tokens, 16, generator=seeded), padding=torch.tensor([0, num_tokens // 3]))
    for _ in range(5):
        cache.decode(*torch.randn(3, 2, 2, 1, 16, generator=seeded))
    rebuilt = cache.copy()
    token, following = torch.randn(2, 3, 2, 2, 1, 16, generator=seeded)
    rebuilt.decode(*token)
    rebuilt.rewind(cache.num_seen, cache.row_seen)  # this drops the index
    cache.select_rows(torch.tensor([0, 1]))
    for x in (following, token):
        torch.testing.assert_close(cache.decode(*x), rebuilt.decode(*x), rtol=1e-5, atol=1e-6)
        assert cache.read_bytes == rebuilt.read_bytes
