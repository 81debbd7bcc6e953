"""The ways to attend that are compared: our steps, torch's and transformers' attention, and packages for GPUs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rocketkv.attention import LayerCache
from rocketkv.bench.geometries import Geometry
from rocketkv.bench.tensors import SPARE_TOKENS

WORKSPACE_BYTES = 128 * 2**20  # what FlashInfer asks for


@dataclass
class Path:
    """One way to attend.

    Attributes:
        name: the row's name.
        token_budget: the budget in tokens; None for a path without one.
        num_layers: the number of layers that the path goes through in turn, each with its own memory.
        attend: a function that appends one token to a layer and attends.
        read_bytes: a function that returns the bytes that a step must read.
        caches: the caches of ours to which a step appends.
    """

    name: str
    token_budget: int | None
    num_layers: int
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    read_bytes: Callable[[], int]
    caches: list[LayerCache] = field(default_factory=list)


class _Module(nn.Module):
    """The attributes of a layer that transformers' attention function reads."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.num_key_value_groups = geometry.num_heads // geometry.num_kv_heads
        self.is_causal = True


def ours(name: str, token_budget: int | None, caches: list[LayerCache]) -> Path:
    """Return the path of our own steps."""
    return Path(
        name,
        token_budget,
        len(caches),
        lambda layer, query, key, value: caches[layer].decode(query, key, value),
        lambda: caches[0].read_bytes,
        caches,
    )


def sdpa_grouped(caches: list[LayerCache]) -> Path:
    """Return the path of torch's attention over our dense buffers, with a KV head's query heads as queries."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = _tokens_far_from(caches, layer)
        grouped = query.reshape(*key.shape[:2], -1, key.shape[3])
        return scaled_dot_product_attention(grouped, keys, values).reshape(query.shape)

    return Path("sdpa_grouped", None, len(caches), attend, lambda: caches[0].read_bytes)


def sdpa_gqa(caches: list[LayerCache]) -> Path:
    """Return the path of torch's attention over the same buffers, with grouped heads by torch's own option."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, *_tokens_far_from(caches, layer), enable_gqa=True)

    return Path("sdpa_gqa", None, len(caches), attend, lambda: caches[0].read_bytes)


def flash_attn(caches: list[LayerCache]) -> Path:
    """Return the path of the flash-attn package over the same buffers; it appends nothing."""
    flash = import_module("flash_attn").flash_attn_with_kvcache

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = _tokens_far_from(caches, layer)
        output: Tensor = flash(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        return output

    return Path("flash_attn", None, len(caches), attend, lambda: caches[0].read_bytes)


def flashinfer(caches: list[LayerCache], num_heads: int) -> Path:
    """Return the path of the FlashInfer package over the same buffers, each row as one page; it appends nothing."""
    working = caches[0].working
    assert working is not None
    batch, num_kv_heads, capacity, head_dim = working.tokens.fields["keys"].shape
    options: dict[str, Any] = {"dtype": torch.int32, "device": working.like.device}
    buffer = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=working.like.device)
    wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(buffer, "HND")
    first, lengths = torch.arange(batch + 1, **options), torch.full((batch,), working.max_length, **options)
    dtype = working.like.dtype
    sizes = num_heads, num_kv_heads, head_dim, capacity
    wrapper.plan(first, first[:-1], lengths, *sizes, q_data_type=dtype, kv_data_type=dtype)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        far = caches[(layer + len(caches) // 2) % len(caches)].working
        assert far is not None
        output: Tensor = wrapper.run(query[:, :, 0], (far.tokens.fields["keys"], far.tokens.fields["values"]))
        return output

    return Path("flashinfer", None, len(caches), attend, lambda: caches[0].read_bytes)


def _tokens_far_from(caches: list[LayerCache], layer: int) -> tuple[Tensor, Tensor]:
    """Return keys and values of the layer that is farthest from `layer`, to which `dense` attends."""
    working = caches[(layer + len(caches) // 2) % len(caches)].working
    assert working is not None
    return working.keys_and_values()


def transformers_default(cache: DynamicCache, dense: list[LayerCache], geometry: Geometry) -> Path:
    """Return the path of a model of transformers by default: its cache, then its attention function."""
    module = _Module(geometry).eval()
    scale = geometry.head_dim**-0.5

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = cache.update(key, value, layer)
        output: Tensor = sdpa_attention_forward(module, query, keys, values, None, scaling=scale)[0]
        return output

    return Path("transformers_default", None, len(dense), attend, lambda: dense[0].read_bytes)


def transformers_static(keys: Tensor, values: Tensor, dense: list[LayerCache], geometry: Geometry) -> Path:
    """Return the path of transformers' cache for graphs, filled with `keys` and `values` `[B, Hkv, S, D]`.

    The mask hides the cache's spare room, as a model of transformers has it.
    """
    module = _Module(geometry).eval()
    room = keys.shape[2] + SPARE_TOKENS
    layers = [StaticLayer(room) for _ in dense]
    for layer in layers:
        layer.update(keys, values)
    mask = (torch.arange(room, device=keys.device) <= keys.shape[2])[None, None, None]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        stored = layers[layer].update(key, value)
        output: Tensor = sdpa_attention_forward(module, query, *stored, mask, scaling=geometry.head_dim**-0.5)[0]
        return output

    return Path("transformers_static", None, len(dense), attend, lambda: dense[0].read_bytes)
