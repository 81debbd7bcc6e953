"""Transformers' own layers of a cache: copies, rows and statistics of the layers that are not compressed."""

from collections.abc import Sequence
from copy import copy

import torch
from transformers.cache_utils import DynamicLayer

from rocketkv.stats import LayerStats


def first_columns(layer: DynamicLayer, num_columns: int) -> DynamicLayer:
    """Return a layer that has seen only the first `num_columns` of a layer that still has all of its columns."""
    if layer.get_seq_length() == num_columns:
        return layer
    first = copy(layer)
    first.keys, first.values = (x[:, :, :num_columns] for x in (layer.keys, layer.values))
    if hasattr(first, "cumulative_length"):
        first.cumulative_length = num_columns
    return first


def join_rows(layers: Sequence[DynamicLayer]) -> DynamicLayer:
    """Return a layer with the rows of several layers that have seen equally many columns; those stay as they are."""
    joined = copy(layers[0])
    joined.keys, joined.values = (torch.cat([getattr(x, name) for x in layers]) for name in ("keys", "values"))
    return joined


def plain_stats(layer: DynamicLayer, rows: int = 1) -> LayerStats:
    """Return what a layer, or one of its `rows` rows, stores and reads: all of it, as a full cache does."""
    if not layer.is_initialized:
        return LayerStats()
    num_bytes = (layer.keys.nbytes + layer.values.nbytes) // rows
    return LayerStats(layer.get_seq_length(), layer.keys.shape[2], num_bytes, num_bytes, num_bytes, num_bytes)
