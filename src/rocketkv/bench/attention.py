"""Times one decode step of one layer's attention: ours, sparse and dense, beside torch's and transformers'.

Kernels are timed as decoding meets them: after a matrix product of torch, with its threads and its traffic, and on a
layer that was last read so many bytes ago that no processor cache still has it. On a GPU a graph takes one step in each
layer, so that the host's time does not count.
"""

import gc
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rocketkv.bench import paths as ways
from rocketkv.bench.device import MemoryRead, available_bytes, check_memory
from rocketkv.bench.geometries import Geometry
from rocketkv.bench.graphs import Replayed
from rocketkv.bench.paths import Path
from rocketkv.bench.tensors import dense_config, held_bytes, loaded_cache, random_tokens, sparse_config
from rocketkv.bench.timing import Call, OnRound, Point, Row, run_rounds, timed
from rocketkv.config import DEFAULT_SELECTION

SPARSE_BYTES = 8 * 2**30  # the most bytes of all layers of all sparse paths together
MOST_LAYERS = 1024
_WALK = 8  # the most layers that count in a turn
_QUERIES = 16  # queries that are drawn in advance and used in turn


def measure_attention(
    geometry: Geometry,
    dtype: torch.dtype,
    point: Point,
    cold_bytes: int,
    on_round: OnRound | None = None,
    *,
    selections: Sequence[str] = (DEFAULT_SELECTION,),
    device: str = "cpu",
) -> tuple[list[Row], float]:
    """Measure one point, where a path reads `cold_bytes` before it comes back to the same layer.

    Returns:
        Rows `sparse` (one per budget; `sparse:NAME` of another of the `selections` than the default) and `dense`; on a
        CPU `sdpa_grouped` and `transformers_default`; on a GPU, where all are replays of graphs, `sdpa_gqa`,
        `transformers_static` and, of packages that are installed, `flash_attn` and `flashinfer`. `bytes` are those that
        a step must read. And the bandwidth of the memory in the same rounds, of its median read, in bytes per second.

    Raises:
        InputError: the point does not fit in memory.
    """
    read = MemoryRead(device)
    with torch.inference_mode():
        paths = _build(geometry, dtype, point, cold_bytes, selections, device)
        calls: dict[int, Call] = {**_calls(paths, geometry, point.batch, dtype, device), len(paths): read}
        times = run_rounds(calls, point.pace, on_round)
    rows = []
    for i, path in enumerate(paths):
        details: dict[str, object] = {"layers": path.num_layers}
        if path.caches:
            details["backend"] = path.caches[0].backend
        rows.append(Row(path.name, times[i], path.read_bytes(), point.seq_len, path.token_budget, point.batch, details))
    return rows, 1000 * read.num_bytes / median(times[len(paths)])


def _build(
    geometry: Geometry, dtype: torch.dtype, point: Point, cold_bytes: int, selections: Sequence[str], device: str
) -> list[Path]:
    """Return every path, filled, and stepped once in each layer so that set-up is not timed."""
    gc.collect()  # this frees the caches of the last point
    seq_len, batch = point.seq_len, point.batch
    token_bytes = batch * geometry.token_elements * dtype.itemsize  # the bytes of one layer
    layer_bytes = seq_len * token_bytes
    num_dense = min(MOST_LAYERS, max(2, -(-cold_bytes // layer_bytes)))
    sparse, sparse_bytes = [], 0
    kinds = list(product(selections, point.token_budgets))
    for selection, token_budget in kinds:
        config = sparse_config(token_budget, selection)
        wanted = -(-cold_bytes // (min(token_budget, seq_len) * token_bytes))
        held = held_bytes(config, seq_len, token_bytes)
        num_layers = max(2, min(wanted, SPARSE_BYTES // (len(kinds) * held), MOST_LAYERS))
        name = "sparse" if selection == DEFAULT_SELECTION else f"sparse:{selection}"
        sparse.append((name, config, num_layers))
        sparse_bytes += num_layers * held
    transient = 2 * layer_bytes  # tokens to fill in; torch.cat's result exists beside its input
    available = available_bytes(device)
    needed = sparse_bytes + transient + 2 * num_dense * layer_bytes
    if available is not None and needed > available and layer_bytes >= cold_bytes:
        needed -= 2 * (num_dense - 1) * layer_bytes
        num_dense = 1  # one layer alone is larger than any processor cache
    check_memory(f"attention over {seq_len} tokens x batch {batch} of {geometry.name}", needed, device)

    shape = (batch, geometry.num_kv_heads, seq_len, geometry.head_dim)
    keys, values = random_tokens(*shape, dtype, device), random_tokens(*shape, dtype, device)
    paths = []
    for name, config, num_layers in sparse:
        caches = [loaded_cache(config, keys, values, seq_len) for _ in range(num_layers)]
        paths.append(ways.ours(name, config.token_budget, caches))
    dense = [loaded_cache(dense_config(max(point.token_budgets)), keys, values, seq_len) for _ in range(num_dense)]
    paths.append(ways.ours("dense", None, dense))
    if device != "cpu":
        paths += [ways.sdpa_gqa(dense), ways.transformers_static(keys, values, dense, geometry)]
        if dtype != torch.float32 and find_spec("flash_attn") is not None:
            paths.append(ways.flash_attn(dense))
        if dtype != torch.float32 and find_spec("flashinfer") is not None:
            paths.append(ways.flashinfer(dense, geometry.num_heads))
        return paths
    plain = DynamicCache()
    for layer in range(num_dense):
        plain.update(keys, values, layer)
    return [*paths, ways.sdpa_grouped(dense), ways.transformers_default(plain, dense, geometry)]


def _calls(paths: list[Path], geometry: Geometry, batch: int, dtype: torch.dtype, device: str) -> dict[int, Call]:
    """Return one call per path: on a CPU a matrix product and then the attention, whose time alone counts.

    On a GPU the call replays a graph of one step in every layer.
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    hidden = torch.randn(batch, geometry.hidden_size, **options)
    weight = torch.randn(geometry.hidden_size, geometry.hidden_size, **options)
    queries = torch.randn(_QUERIES, batch, geometry.num_heads, 1, geometry.head_dim, **options)
    keys = torch.randn(_QUERIES, batch, geometry.num_kv_heads, 1, geometry.head_dim, **options)

    def make(path: Path) -> Call:
        count = 0

        def step(layer: int) -> float:
            nonlocal count
            count += 1
            query, key = queries[count % _QUERIES], keys[count % _QUERIES]
            value = keys[(count + 1) % _QUERIES]
            torch.mm(hidden, weight)
            return timed(lambda: path.attend(layer, query, key, value), device)

        def walk() -> float:
            """Time several layers in a row, as in decoding; the first, which meets other paths' data, is left out."""
            step(count % path.num_layers)
            num_counted = min(_WALK, path.num_layers)
            return sum(step(count % path.num_layers) for _ in range(num_counted)) / num_counted

        for layer in range(path.num_layers):
            step(layer)
        return walk

    def replay(path: Path) -> Call:
        def work() -> Tensor:
            for layer in range(path.num_layers):
                output = path.attend(layer, queries[layer % _QUERIES], keys[layer % _QUERIES], keys[layer % _QUERIES])
            return output

        replayed = Replayed(work, path.caches, device)
        return lambda: replayed() / path.num_layers

    return {i: (make if device == "cpu" else replay)(path) for i, path in enumerate(paths)}
