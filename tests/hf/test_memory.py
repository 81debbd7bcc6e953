"""Tests of a cache's memory inside a model: what is freed, the peak of a prefill, and no quadratic mask."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
)

from conversations import architectures, live_token_bytes
from rocketkv import RocketKVCache, RocketKVConfig, enable
from rocketkv.eviction import SnapKV
from rocketkv.hf.versions import pass_cache
from rocketkv.index import LowBitIndex
from rocketkv.ragged import RaggedTokens
from tiny import COMPRESSED, GROUPED, generate, prompts, tiny_model


@architectures
def test_memory_goes_and_stats_tell(name: str) -> None:
    model = enable(tiny_model(name))
    ids, mask = prompts(600, 600)
    cache = RocketKVCache(model.config, COMPRESSED)
    assert cache.stats().total.kv_bytes == 0
    generate(model, ids, mask, **pass_cache(cache))
    stats = cache.stats()
    full = DynamicCache(config=model.config)
    generate(model, ids, mask, **pass_cache(full))
    for layer, layer_stats, full_layer in zip(cache.layers, stats.layers, full.layers, strict=True):
        full_bytes = full_layer.keys.nbytes + full_layer.values.nbytes
        assert layer_stats.full_kv_bytes == layer_stats.full_read_bytes == full_bytes
        if layer.is_sliding:
            assert layer_stats.kv_bytes == layer_stats.read_bytes == full_bytes
        else:
            assert layer_stats.num_seen == 611
            assert layer_stats.num_stored == int(layer.cache.num_stored[0, 0])
            assert layer_stats.kv_bytes == layer.cache.kv_bytes < 0.6 * full_bytes
            assert layer_stats.read_bytes == layer.cache.read_bytes < 0.06 * full_bytes
    total = stats.total
    assert total.kv_bytes == sum(layer.kv_bytes for layer in stats.layers)
    assert total.retained_fraction == total.kv_bytes / total.full_kv_bytes
    assert total.compression_factor == total.full_read_bytes / total.read_bytes


def test_prefill_peaks_at_two_full_layers_and_the_compressed_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers, num_tokens = 6, 1500
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**GROUPED, "num_hidden_layers": layers})).eval()
    enable(model)
    samples: list[int] = []

    def measured(owner: type, name: str) -> None:
        """Measure when `owner.name` is called, and again with its result beside its inputs."""
        plain = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            samples.append(live_token_bytes())
            result = plain(*args, **options)
            samples.append(live_token_bytes())
            return result

        monkeypatch.setattr(owner, name, call)

    measured(SnapKV, "keep")
    measured(RaggedTokens, "keep")
    measured(LowBitIndex, "__init__")
    cache = RocketKVCache(model.config, RocketKVConfig(dense_below=0, token_budget=32, window_size=8, kernel_size=5))
    ids, _ = prompts(num_tokens)
    before = live_token_bytes()
    with torch.inference_mode():
        model(input_ids=ids, **pass_cache(cache))
    gc.collect()
    full_layer = 2 * 2 * num_tokens * 16 * 4
    compressed = [layer.cache.kv_bytes for layer in cache.compressed_layers]
    peak = max(samples) - before
    assert len(samples) == 6 * layers
    assert peak > full_layer  # this checks that the measurement sees the tokens
    assert peak < 2 * full_layer + sum(compressed[:-2])
    assert live_token_bytes() - before <= sum(compressed)  # after prefill nothing of full length is left


def test_no_quadratic_mask_when_nothing_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable(tiny_model("llama"))
    largest = 0
    compare = torch.Tensor.__ge__

    def watched(self: Tensor, other: Any) -> Tensor:
        nonlocal largest
        result = compare(self, other)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__ge__", watched)
    monkeypatch.setattr("rocketkv.hf.interface.sdpa_mask", lambda *_, **__: pytest.fail("a mask was made"))
    ids, _ = prompts(1800)
    cache = RocketKVCache(model.config, COMPRESSED)
    generate(model, ids, **pass_cache(cache), new=2)
    assert largest <= 8 * 2 * 1800  # the window's own mask, per KV head
