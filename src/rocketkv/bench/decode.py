"""Whole decode steps of a transformers model, and how close they come to the best that sparse attention can give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import rocketkv
from rocketkv.attention import LayerCache
from rocketkv.bench.device import available_bytes, check_memory, measure_bandwidth
from rocketkv.bench.graphs import Replayed
from rocketkv.bench.model import Sizes, decode_step, full_cache, our_cache, sizes_of, static_cache
from rocketkv.bench.tensors import dense_config, held_bytes, kept_tokens, random_tokens, sparse_config
from rocketkv.bench.timing import Call, OnRound, Point, Row, run_rounds, timed
from rocketkv.hf import RocketKVCache, cache_stats
from rocketkv.hf.recording import RECORDERS
from rocketkv.hf.switch import disable, enable
from rocketkv.ops import NO_TERMS, LogitTerms
from rocketkv.stats import LayerStats

Prepare = Callable[[PreTrainedModel], PreTrainedModel]  # `disable` undoes it
NAMES = ("rest", "rocketkv", "dense", "full", "static")  # the contenders; `static` takes part on a GPU only

PATHS: dict[str, Prepare] = {"eager": enable, "fast": rocketkv.compile}  # the ways to run a model


@dataclass(frozen=True)
class Contender:
    """A cache to decode with.

    Attributes:
        name: the row's name, one of `NAMES`.
        token_budget: the budget in tokens; None for a cache without one.
        needed_bytes: about how many bytes of memory the cache needs.
        build: a function that makes the cache and fills it.
    """

    name: str
    token_budget: int | None
    needed_bytes: int
    build: Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """The model and the point of the sweep, which are the same for all contenders."""

    model: PreTrainedModel
    sizes: Sizes
    point: Point

    @property
    def device(self) -> str:
        """The kind of the model's device, `cpu` or `cuda`."""
        return str(self.model.device.type)


class NoAttention(LayerCache):
    """A layer that attends to nothing and answers zeros: a model's step with it is the rest of the step."""

    def __init__(self, num_seen: int) -> None:
        super().__init__(sparse_config(256))
        self.num_seen = num_seen

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        terms: LogitTerms = NO_TERMS,
    ) -> Tensor:
        """Return zeros in the shape of `query`."""
        self.num_seen += 1
        return torch.zeros_like(query)


def measure_decode(
    model: PreTrainedModel,
    point: Point,
    paths: Sequence[str],
    on_round: OnRound | None = None,
    *,
    names: Sequence[str] = NAMES,
) -> tuple[list[Row], list[dict[str, object]], float]:
    """Measure one point on these `paths` of `PATHS`, with those contenders that `names` has.

    After one path the model stays as the path needs it, so that the next point compiles nothing anew.

    Returns:
        Rows `rocketkv`, `dense`, `full`, on a GPU `static`, `rest` and `sparse_attention` per path; `bytes` are those
        that a step must read, weights included. How the steps compare with the best that the attention allows. And the
        bandwidth of the memory meanwhile, in bytes per second.

    Raises:
        InputError: the point does not fit in memory.
    """
    setting = Setting(model, sizes_of(model), point)
    contenders = [contender for contender in _contenders(setting) if contender.name in names]
    largest = max(contender.needed_bytes for contender in contenders)
    together = sum(contender.needed_bytes for contender in contenders)
    available = available_bytes(setting.device)
    check_memory(f"decoding after {point.seq_len} tokens x batch {point.batch}", largest, setting.device)
    is_interleaved = available is None or together <= available
    groups = [contenders] if is_interleaved else [[contender] for contender in contenders]

    bandwidth = measure_bandwidth(setting.device)
    rows: list[Row] = []
    comparisons: list[dict[str, object]] = []
    for name in paths:
        PATHS[name](model)
        try:
            measured = [row for group in groups for row in _measure_group(setting, group, on_round)]
        finally:
            if len(paths) > 1:
                disable(model)
        for row in measured:
            row.details.update(path=name, interleaved=is_interleaved)
        rows += measured
        comparisons += _compare(name, measured)
    return rows, comparisons, max(bandwidth, measure_bandwidth(setting.device))


def _contenders(setting: Setting) -> list[Contender]:
    model, sizes, point = setting.model, setting.sizes, setting.point
    seq_len, batch, token_budgets = point.seq_len, point.batch, point.token_budgets
    token_bytes = 2 * batch * sizes.num_kv_heads * sizes.head_dim * model.dtype.itemsize
    device = setting.device

    def tokens(count: int) -> tuple[Tensor, Tensor]:
        shape = (batch, sizes.num_kv_heads, count, sizes.head_dim)
        return random_tokens(*shape, model.dtype, device), random_tokens(*shape, model.dtype, device)

    def ours(name: str, token_budget: int | None) -> Contender:
        config = dense_config(max(token_budgets)) if token_budget is None else sparse_config(token_budget)
        kept = kept_tokens(config, seq_len)
        needed = sizes.num_layers * held_bytes(config, seq_len, token_bytes) + kept * token_bytes
        return Contender(name, token_budget, needed, lambda: our_cache(model, config, *tokens(kept), seq_len))

    def rest() -> RocketKVCache:
        cache = RocketKVCache(model.config, sparse_config(256))
        for layer in cache.compressed_layers:
            layer.cache = NoAttention(seq_len)
        return cache

    full_bytes = (sizes.num_layers + 1) * seq_len * token_bytes
    contenders = [
        Contender("rest", None, 0, rest),
        *(ours("rocketkv", token_budget) for token_budget in token_budgets),
        ours("dense", None),
        Contender("full", None, full_bytes, lambda: full_cache(model, *tokens(seq_len))),
    ]
    if device in RECORDERS:
        contenders.append(Contender("static", None, full_bytes, lambda: static_cache(model, *tokens(seq_len))))
    return contenders


def _measure_group(setting: Setting, contenders: Sequence[Contender], on_round: OnRound | None) -> list[Row]:
    """Measure what fits in memory at once, turn by turn."""
    caches = [contender.build() for contender in contenders]
    calls: dict[tuple[int, str], Call] = {}
    for i, (contender, cache) in enumerate(zip(contenders, caches, strict=True)):
        calls[i, contender.name] = _step(setting, contender.name, cache)
        if contender.name == "rocketkv":
            calls[i, "sparse_attention"] = _attention(setting, cache)
    times = run_rounds(calls, setting.point.pace, on_round)
    rows = []
    for (i, name), times_ms in times.items():
        stats = _stats(caches[i])
        kv_read_bytes = 0 if name == "rest" else stats.read_bytes
        num_bytes = kv_read_bytes + (0 if name == "sparse_attention" else setting.sizes.weight_bytes)
        row = Row(name, times_ms, num_bytes, setting.point.seq_len, contenders[i].token_budget, setting.point.batch)
        row.details.update(kv_read_bytes=kv_read_bytes, kv_bytes=0 if name == "rest" else stats.kv_bytes)
        if name in ("rocketkv", "sparse_attention", "dense"):
            row.details["backend"] = caches[i].compressed_layers[0].cache.backend
        if name not in ("rest", "sparse_attention"):
            row.details["tokens_per_second"] = 1000 * setting.point.batch / row.median_ms
        rows.append(row)
    return rows


def _stats(cache: Any) -> LayerStats:
    """Return what a cache of any kind stores and reads."""
    if not isinstance(cache, StaticCache):
        return cache_stats(cache).total
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return LayerStats(kv_bytes=num_bytes, read_bytes=num_bytes)


def _step(setting: Setting, name: str, cache: Any) -> Call:
    """Return a call that times one step of the whole model.

    On a GPU every step but `full` comes from a graph: those of our caches through a compiled model's own, `static` and
    `rest`, whose host counts nothing, through one of this benchmark.
    """
    model, device = setting.model, setting.device
    input_ids = torch.ones(setting.point.batch, 1, dtype=torch.int64, device=device)
    positions = torch.full_like(input_ids, setting.point.seq_len)
    if device in RECORDERS and name in ("static", "rest"):
        return Replayed(lambda: decode_step(model, cache, input_ids, position_ids=positions), [], device)
    if device in RECORDERS:
        for _ in range(3):  # a compiled model compiles in the first step and captures in the second
            decode_step(model, cache, input_ids)
    return lambda: timed(lambda: decode_step(model, cache, input_ids), device)


def _attention(setting: Setting, cache: RocketKVCache) -> Call:
    """Return a call that times the attention of one step alone.

    On a CPU each layer comes after a matrix product, and their times are added up; a GPU replays a graph of them all.
    """
    sizes, options = setting.sizes, {"dtype": setting.model.dtype, "device": setting.device}
    query = torch.randn(setting.point.batch, sizes.num_heads, 1, sizes.head_dim, **options)
    key = torch.randn(setting.point.batch, sizes.num_kv_heads, 1, sizes.head_dim, **options)
    hidden = query.flatten(1)
    weight = torch.randn(hidden.shape[1], hidden.shape[1], **options)
    layers = [layer.cache for layer in cache.compressed_layers]
    # With the model's own scale the layers keep the steps that they have bound for the model.
    scale = next(float(module.scaling) for module in setting.model.modules() if hasattr(module, "scaling"))

    @torch.inference_mode()
    def work() -> Tensor:
        return torch.cat([layer.decode(query, key, key, scale=scale) for layer in layers])

    @torch.inference_mode()
    def call() -> float:
        total = 0.0
        for layer in layers:
            torch.mm(hidden, weight)
            total += timed(lambda layer=layer: layer.decode(query, key, key, scale=scale), setting.device)  # type: ignore[misc]
        return total

    return Replayed(work, layers, setting.device) if setting.device in RECORDERS else call


def _compare(path: str, rows: Sequence[Row]) -> list[dict[str, object]]:
    """Compare each step with Amdahl's limit, which is a baseline's step over the rest of a step and our attention."""
    medians = {(row.name, row.token_budget): row.median_ms for row in rows}
    comparisons: list[dict[str, object]] = []
    for row in rows:
        if row.name != "rocketkv":
            continue
        best_ms = medians["rest", None] + medians["sparse_attention", row.token_budget]
        for baseline in [name for name in ("dense", "full") if (name, None) in medians]:
            amdahl = medians[baseline, None] / best_ms
            achieved = medians[baseline, None] / row.median_ms
            comparisons.append(
                {
                    "path": path,
                    "baseline": baseline,
                    "seq_len": row.seq_len,
                    "token_budget": row.token_budget,
                    "batch": row.batch,
                    "amdahl_factor": amdahl,
                    "achieved_factor": achieved,
                    "share_percent": 100 * achieved / amdahl,
                }
            )
    return comparisons
