"""Measures the attention of prompts: ours, torch's, what compression adds to it, and whole models with either."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel

from rocketkv import backends
from rocketkv.attention import LayerCache
from rocketkv.bench.device import check_memory
from rocketkv.bench.geometries import Geometry
from rocketkv.bench.tensors import random_tokens, sparse_config
from rocketkv.bench.timing import Call, OnRound, Point, Row, run_rounds, timed
from rocketkv.hf import RocketKVCache, cache_stats
from rocketkv.hf.switch import disable, enable
from rocketkv.hf.versions import pass_cache

_LAYERS = 2  # layers with their own inputs, which are measured in turn


def measure_prefill(
    geometry: Geometry, dtype: torch.dtype, point: Point, on_round: OnRound | None = None, *, device: str = "cpu"
) -> list[Row]:
    """Measure the prefill of one layer's attention.

    Returns:
        Rows `rocketkv` (one per budget), a cache's prefill, with `overhead_percent` over its attention alone;
        `attention`, that alone; and `sdpa`, torch's. `bytes` are those held afterwards, and `gflop_per_s` counts the
        products that causal attention needs.

    Raises:
        InputError: the point does not fit in memory.
    """
    seq_len, batch = point.seq_len, point.batch
    shapes = [(geometry.num_heads, geometry.head_dim), *[(geometry.num_kv_heads, geometry.head_dim)] * 2]
    input_bytes = sum(batch * seq_len * heads * width for heads, width in shapes) * dtype.itemsize
    check_memory(f"the prefill of {seq_len} tokens x batch {batch}", (_LAYERS + 2) * input_bytes, device)
    inputs = [
        tuple(random_tokens(batch, heads, seq_len, width, dtype, device) for heads, width in shapes)
        for _ in range(_LAYERS)
    ]
    num_bytes = inputs[0][1].nbytes + inputs[0][2].nbytes
    held: dict[int | str, int] = {"attention": num_bytes, "sdpa": num_bytes}
    scale = geometry.head_dim**-0.5

    def attend(query: Tensor, key: Tensor, value: Tensor) -> None:
        backends.prefill_densely(query, key, value, scale=scale)

    def attend_in_torch(query: Tensor, key: Tensor, value: Tensor) -> None:
        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1])

    def compress(token_budget: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        def prefill(query: Tensor, key: Tensor, value: Tensor) -> None:
            cache = LayerCache(sparse_config(token_budget))
            cache.prefill(query, key, value)
            held[token_budget] = cache.kv_bytes

        return prefill

    works: dict[int | str, Callable[..., None]] = {budget: compress(budget) for budget in point.token_budgets}
    works |= {"attention": attend, "sdpa": attend_in_torch}
    with torch.inference_mode():
        times = run_rounds({key: _call(work, inputs) for key, work in works.items()}, point.pace, on_round)
    rows = {
        key: Row("rocketkv", times_ms, held[key], seq_len, key, batch)
        if isinstance(key, int)
        else Row(key, times_ms, held[key], seq_len, None, batch)
        for key, times_ms in times.items()
    }
    num_operations = 2 * batch * geometry.num_heads * geometry.head_dim * seq_len * (seq_len + 1)
    for row in rows.values():
        row.details["gflop_per_s"] = num_operations / row.median_ms / 1e6
        if row.name == "rocketkv":
            row.details["overhead_percent"] = 100 * (row.median_ms / rows["attention"].median_ms - 1)
    return list(rows.values())


def measure_model_prefill(model: PreTrainedModel, point: Point, on_round: OnRound | None = None) -> list[Row]:
    """Measure the prompt of a whole model, up to the logits of its last token.

    Returns:
        Rows `model_rocketkv` (one per budget) and `model_transformers`, the same with transformers' own cache and
        SDPA; `bytes` are those that the cache holds afterwards.
    """
    device = model.device.type
    input_ids = torch.randint(0, model.config.vocab_size, (point.batch, point.seq_len), device=model.device)
    held: dict[int | None, int] = {}

    def run(token_budget: int | None) -> Call:
        def call() -> float:
            cache: Any
            if token_budget is None:
                cache = DynamicCache(config=disable(model).config)
            else:
                cache = RocketKVCache(enable(model).config, sparse_config(token_budget))
            with torch.inference_mode():
                time_ms = timed(
                    lambda: model(input_ids=input_ids, **pass_cache(cache), use_cache=True, logits_to_keep=1), device
                )
            held[token_budget] = cache_stats(cache).total.kv_bytes
            return time_ms

        return call

    budgets = [*point.token_budgets, None]
    times = run_rounds({budget: run(budget) for budget in budgets}, point.pace, on_round)
    return [
        Row(
            "model_transformers" if budget is None else "model_rocketkv",
            times[budget],
            held[budget],
            point.seq_len,
            budget,
            point.batch,
        )
        for budget in budgets
    ]


def _call(work: Callable[..., None], inputs: list[tuple[Tensor, ...]]) -> Call:
    """Return a call that times the work on one layer, on another layer at each call."""
    count = 0

    def call() -> float:
        nonlocal count
        count += 1
        tensors = inputs[count % len(inputs)]
        return timed(lambda: work(*tensors), tensors[0].device.type)

    return call
