"""Whole models of a geometry with random weights, and caches for them that are filled without a prefill."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    StaticCache,
)
from transformers.initialization import no_init_weights

from rocketkv.bench.geometries import Geometry
from rocketkv.bench.tensors import SPARE_TOKENS, kept_tokens
from rocketkv.config import RocketKVConfig
from rocketkv.hf import RocketKVCache, RocketKVLayer, head_dims
from rocketkv.hf.versions import pass_cache

_CONFIGS = {"gemma3_text": Gemma3TextConfig, "llama": LlamaConfig, "qwen3": Qwen3Config}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model's attention and weights.

    Attributes:
        num_layers: the number of decoder layers.
        num_heads: the number of query heads, Hq.
        num_kv_heads: the number of KV heads, Hkv.
        head_dim: the number of channels of a key, D.
        weight_bytes: the bytes of the weights that a decode step must read.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    weight_bytes: int


def build_model(geometry: Geometry, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Return a model of this geometry in evaluation mode; its random weights repeat, as only their bytes matter."""
    config = _CONFIGS[geometry.model_type](
        vocab_size=geometry.vocab_size,
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.intermediate_size,
        num_hidden_layers=geometry.num_layers,
        num_attention_heads=geometry.num_heads,
        num_key_value_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        tie_word_embeddings=geometry.is_tied,
        max_position_embeddings=2**20,
    )
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.tie_weights()
    block = torch.empty(2**20, dtype=dtype, device=device).normal_(0.0, 0.02)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            for part in weight.view(-1).split(block.numel()):
                part.copy_(block[: part.numel()])
    return model


def sizes_of(model: PreTrainedModel) -> Sizes:
    """Read the sizes of this model."""
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    weights = {weight.data_ptr(): weight.nbytes for weight in model.state_dict().values()}
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not embedding:
        del weights[embedding.data_ptr()]  # a step reads only one row of the embedding per token
    return Sizes(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dims(config)[0],
        weight_bytes=sum(weights.values()),
    )


def full_cache(model: PreTrainedModel, keys: Tensor, values: Tensor) -> DynamicCache:
    """Return transformers' own cache with copies of `keys` and `values` `[B, Hkv, S, D]` in every layer."""
    cache = DynamicCache(config=model.config)
    for layer in range(len(cache.layers)):
        cache.update(keys, values, layer)
    return cache


def our_cache(
    model: PreTrainedModel, config: RocketKVConfig, keys: Tensor, values: Tensor, seq_len: int
) -> RocketKVCache:
    """Return our cache as after a prompt of `seq_len` tokens, with the first of `keys`, `values` `[B, Hkv, N, D]`."""
    cache = RocketKVCache(model.config, config)
    kept = kept_tokens(config, seq_len)
    for layer in cache.layers:
        if isinstance(layer, RocketKVLayer):
            layer.cache.load_tokens(keys[:, :, :kept], values[:, :, :kept], num_seen=seq_len)
        else:  # a sliding window forgets most of the tokens
            shape = (-1, -1, seq_len, -1)
            layer.update(keys[:, :, :1].expand(shape), values[:, :, :1].expand(shape))
    return cache


def static_cache(model: PreTrainedModel, keys: Tensor, values: Tensor) -> StaticCache:
    """Return transformers' cache for graphs, with room for more, and `keys` and `values` `[B, Hkv, S, D]` inside."""
    cache = StaticCache(config=model.config, max_cache_len=keys.shape[2] + SPARE_TOKENS)
    for layer in range(len(cache.layers)):
        cache.update(keys, values, layer)
    return cache


def decode_step(model: PreTrainedModel, cache: Any, input_ids: Tensor, **options: Any) -> Tensor:
    """Run one step of the whole model on `input_ids` `[B, 1]` int64; return the logits `[B, 1, V]`."""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=input_ids, **pass_cache(cache), **options).logits
    return logits
