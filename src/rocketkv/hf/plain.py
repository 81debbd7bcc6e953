"""Transformers' own layers of a cache: copies, rows and statistics of the layers that are not compressed.

Some of them keep tokens (sliding windows), some recurrent states, some both, and some nothing.
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rocketkv.hf.states import join_states, state_bytes, write_states
from rocketkv.stats import CacheStats, LayerStats


def has_tokens(layer: object) -> bool:
    """Return whether a layer is transformers' own and keeps tokens."""
    return isinstance(layer, DynamicLayer)


def first_columns(layer: DynamicLayer, num_columns: int) -> DynamicLayer:
    """Return a layer that has seen only the first `num_columns` of a layer that still has all of its columns."""
    if layer.get_seq_length() == num_columns:
        return layer
    first = copy(layer)
    first.keys, first.values = (x[:, :, :num_columns] for x in (layer.keys, layer.values))
    if hasattr(first, "cumulative_length"):
        first.cumulative_length = num_columns
    return first


def join_rows(layers: Sequence[Any]) -> Any:
    """Return a layer with the rows of several layers that have seen equally many columns; those stay as they are."""
    joined = deepcopy(layers[0])
    if has_tokens(joined):
        joined.keys, joined.values = (torch.cat([getattr(x, name) for x in layers]) for name in ("keys", "values"))
    write_states(joined, join_states(layers))
    return joined


def plain_stats(layer: Any, rows: int = 1) -> LayerStats:
    """Return what a layer, or one of its `rows` rows, stores and reads: all of it, as a full cache does."""
    num_bytes, num_seen, num_stored = state_bytes(layer), 0, 0
    if has_tokens(layer) and layer.is_initialized:
        num_bytes += layer.keys.nbytes + layer.values.nbytes
        num_seen, num_stored = layer.get_seq_length(), layer.keys.shape[2]
    num_bytes //= rows
    return LayerStats(num_seen, num_stored, num_bytes, num_bytes, num_bytes, num_bytes)


def cache_stats(cache: DynamicCache) -> CacheStats:
    """Return what a `RocketKVCache`, or for comparison transformers' own dynamic cache, stores and reads."""
    return CacheStats([layer.stats() if hasattr(layer, "stats") else plain_stats(layer) for layer in cache.layers])
