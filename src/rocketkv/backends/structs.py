"""A layer's tensors as the structs of the native library (csrc/kernels.h), which have addresses and no tensors."""

import torch
from torch import Tensor

from rocketkv.backends.base import LayerTensors
from rocketkv.backends.library import native, native_dtype
from rocketkv.ops import LogitTerms, LowBitKeys, PageBounds


def layer_struct(layer: LayerTensors) -> "native.Layer":
    """Return the layer as the library's struct."""
    out = native.Layer()
    out.dtype = native_dtype(layer.dtype)
    out.batch, out.num_kv_heads, out.token_capacity, out.head_dim = layer.keys.shape
    out.num_heads = layer.num_heads
    out.scale = layer.scale
    set_terms(out.terms, layer.terms)
    out.keys = layer.keys.data_ptr()
    out.values = layer.values.data_ptr()
    out.exponents = address(layer.exponents)
    out.positions = layer.positions.data_ptr()
    out.position_capacity = layer.positions.shape[2]
    out.archived = layer.archive_lengths is not None
    out.lengths = layer.lengths.data_ptr()
    out.archive_lengths = address(layer.archive_lengths)
    out.seen = layer.seen.data_ptr()
    out.scoring = native.Scoring[layer.scoring]
    if layer.pages is not None:
        out.pages = pages_struct(layer.pages)
    if layer.lowbit is not None:
        out.lowbit = lowbit_struct(layer.lowbit)
    out.num_channels = layer.num_channels.data_ptr()
    out.top_k = layer.top_k.data_ptr()
    out.sinks = layer.sinks.data_ptr()
    out.recents = layer.recents.data_ptr()
    out.dense_lengths = layer.dense_lengths.data_ptr()
    return out


def set_terms(out: "native.LogitTerms", terms: LogitTerms) -> None:
    """Let the library's struct have these terms, whose sinks must stay alive while the struct is used."""
    assert terms.sink_logits is None or (terms.sink_logits.dtype, terms.sink_logits.stride()) == (torch.float32, (1,))
    out.sink_logits = address(terms.sink_logits)
    out.softcap = terms.softcap or 0.0


def pages_struct(index: PageBounds) -> "native.Pages":
    """Return the page bounds as the library's struct."""
    out = native.Pages()
    out.bounds = index.bounds.data_ptr()
    out.page_size = index.page_size.data_ptr()
    out.num_blocks, out.num_rows = index.bounds.shape[2:4]
    out.spread = address(index.spread)
    return out


def lowbit_struct(index: LowBitKeys) -> "native.LowBitKeys":
    """Return the low-bit keys as the library's struct."""
    out = native.LowBitKeys()
    out.codes = index.codes.data_ptr()
    out.ranges = index.ranges.data_ptr()
    out.open_keys = index.open_keys.data_ptr()
    out.num_blocks = index.codes.shape[2]
    out.spread = index.spread.data_ptr()
    return out


def keys_struct(keys: Tensor, lengths: Tensor) -> "native.Keys":
    """Return the keys that an index is built from, `[B, Hkv, S, D]`, as the library's struct."""
    out = native.Keys()
    out.dtype = native_dtype(keys.dtype)
    out.batch, out.num_kv_heads, _, out.head_dim = keys.shape
    out.keys = keys.data_ptr()
    out.batch_stride, out.head_stride = keys.stride()[:2]
    out.lengths = lengths.data_ptr()
    return out


def address(tensor: Tensor | None) -> int:
    """Return where a tensor's numbers begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
