"""Measures what compression adds to a prefill: one layer's exact attention with and without it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rocketkv.attention import LayerCache
from rocketkv.bench.device import check_memory
from rocketkv.bench.geometries import Geometry
from rocketkv.bench.tensors import random_tokens, sparse_config
from rocketkv.bench.timing import Call, OnRound, Point, Row, run_rounds, timed

Prefill = Callable[[int | None, tuple[Tensor, ...]], None]

_LAYERS = 2  # layers with their own inputs, which are measured in turn


def measure_prefill(
    geometry: Geometry, dtype: torch.dtype, point: Point, on_round: OnRound | None = None, *, device: str = "cpu"
) -> list[Row]:
    """Measure the prefill of one layer's attention; a model's is `num_layers` of them, and its matrix products.

    Returns:
        Rows `rocketkv` (one per budget) with `overhead_percent`, and `sdpa`; `bytes` are those held afterwards, of one
        layer, and `model_ms` the time of all layers.

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
    held: dict[int | None, int] = {None: inputs[0][1].nbytes + inputs[0][2].nbytes}

    def prefill(token_budget: int | None, tensors: tuple[Tensor, ...]) -> None:
        query, key, value = tensors
        if token_budget is None:
            scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1])
            return
        cache = LayerCache(sparse_config(token_budget))
        cache.prefill(query, key, value)
        held[token_budget] = cache.kv_bytes

    with torch.inference_mode():
        calls = {budget: _call(prefill, budget, inputs) for budget in (*point.token_budgets, None)}
        times = run_rounds(calls, point.pace, on_round)
    rows = []
    for token_budget, times_ms in times.items():
        name = "sdpa" if token_budget is None else "rocketkv"
        rows.append(Row(name, times_ms, held[token_budget], seq_len, token_budget, batch))
    plain_ms = rows[-1].median_ms
    for row in rows:
        row.details["model_ms"] = geometry.num_layers * row.median_ms
        if row.name == "rocketkv":
            row.details["overhead_percent"] = 100 * (row.median_ms / plain_ms - 1)
    return rows


def _call(prefill: Prefill, token_budget: int | None, inputs: list[tuple[Tensor, ...]]) -> Call:
    """Return a call that times the prefill of one layer, of another layer at each call."""
    count = 0

    def call() -> float:
        nonlocal count
        count += 1
        tensors = inputs[count % len(inputs)]
        return timed(lambda: prefill(token_budget, tensors), tensors[0].device.type)

    return call
