"""Random caches, which have the shapes and the memory of a long context without hours of prefill."""

import torch
from torch import Tensor

from rocketkv.attention import LayerCache
from rocketkv.config import DEFAULT_SELECTION, RocketKVConfig

BLOCK = 32768  # tokens drawn at random; longer texts repeat these
ANY_HEAD_DIM = 128  # channels of a key; the number of tokens that stage 1 keeps does not depend on it
SPARE_TOKENS = 256  # tokens to make room for, so that no cache grows during a measurement


def random_tokens(
    batch: int, num_heads: int, num_tokens: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
) -> Tensor:
    """Return normal random numbers, `[B, H, N, D]`."""
    tokens = torch.empty(batch, num_heads, num_tokens, head_dim, dtype=dtype, device=device)
    block = tokens[:, :, :BLOCK].normal_()
    for start in range(BLOCK, num_tokens, BLOCK):
        part = tokens[:, :, start : start + BLOCK]
        part.copy_(block[:, :, : part.shape[2]])
    return tokens


def same_tokens(batch: int, num_heads: int, num_tokens: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return one random token repeated to `[B, H, N, D]`, which takes the memory of one token."""
    return torch.randn(1, 1, 1, head_dim, dtype=dtype).expand(batch, num_heads, num_tokens, head_dim)


def sparse_config(token_budget: int, selection: str = DEFAULT_SELECTION) -> RocketKVConfig:
    """Return RocketKV's options without `dense_below`, so that short contexts are measured with selection, too.

    After a colon, `selection` may have the `kv_dtype`: `lowbit:int8`.
    """
    name, _, kv_dtype = selection.partition(":")
    return RocketKVConfig(token_budget=token_budget, dense_below=0, selection=name, kv_dtype=kv_dtype or "auto")


def dense_config(token_budget: int) -> RocketKVConfig:
    """Return the options of our own full cache, which keeps every token and attends to all."""
    return RocketKVConfig(token_budget=token_budget, eviction="keep_all", selection="dense", new_tokens=SPARE_TOKENS)


def kept_tokens(config: RocketKVConfig, seq_len: int) -> int:
    """Return the number of tokens that stage 1 keeps of a prompt."""
    if config.eviction == "keep_all":
        return seq_len
    return min(seq_len, config.budget_for(seq_len, ANY_HEAD_DIM).kept_tokens)


def loaded_cache(config: RocketKVConfig, keys: Tensor, values: Tensor, seq_len: int) -> LayerCache:
    """Return a layer's cache as after `seq_len` tokens, with the first of `keys`, `values` `[B, Hkv, S, D]`."""
    cache = LayerCache(config)
    kept = kept_tokens(config, seq_len)
    cache.load_tokens(keys[:, :, :kept], values[:, :, :kept], num_seen=seq_len)
    return cache


def held_bytes(config: RocketKVConfig, seq_len: int, token_bytes: int) -> int:
    """Estimate the bytes that a layer's cache takes: keys, values, the index of stage 2 and spare room."""
    kept = kept_tokens(config, seq_len)
    if config.eviction == "keep_all":
        return (kept + SPARE_TOKENS) * token_bytes
    share = 1.5 * config.format.least_share + 0.25  # an index takes half of what it is of; the rest is spare room
    return int(share * (kept + 32) * token_bytes)
