"""The most rows of a context length that fit in a memory, and the tokens per second that they get."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

import rocketkv
from rocketkv.bench.device import available_bytes
from rocketkv.bench.model import Sizes, decode_step, our_cache, sizes_of
from rocketkv.bench.tensors import dense_config, held_bytes, kept_tokens, random_tokens, sparse_config
from rocketkv.bench.timing import OnRound, Point, Row, run_rounds, timed
from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError
from rocketkv.hf import RocketKVCache, cache_stats
from rocketkv.hf.switch import disable

LESS = 0.9  # the next batch to try, as a fraction of one that did not fit
MARGIN = 0.95  # the part of the memory that caches and weights may take; the rest is for activations


@dataclass(frozen=True)
class Plan:
    """A way to cache, and the rows that should fit.

    Attributes:
        name: the row's name, `dense` or `rocketkv`.
        config: the options of the cache.
        token_budget: the budget in tokens; None for `dense`.
        batch: the number of rows.
    """

    name: str
    config: RocketKVConfig
    token_budget: int | None
    batch: int


def measure_capacity(
    model: PreTrainedModel, point: Point, memory_bytes: int | None, most_rows: int, on_round: OnRound | None = None
) -> Iterator[Row]:
    """Find the largest batch of `point.seq_len` tokens that fits beside the weights, and time a compiled decode step.

    Args:
        model: the model, on its device.
        point: the length and the budgets; its batch is not looked at.
        memory_bytes: the memory for weights and caches together; None takes all that the device has available.
        most_rows: the largest batch to try.
        on_round: see `run_rounds`.

    Yields:
        A row `dense` and a row `rocketkv` for each budget, each with its own batch; `bytes` are those of the caches.

    Raises:
        InputError: not even one row fits.
    """
    sizes = sizes_of(model)
    rocketkv.compile(model)
    try:
        for plan in _plans(model, sizes, point, memory_bytes, most_rows):
            yield _measure(model, plan, point, on_round)
    finally:
        disable(model)


def _plans(
    model: PreTrainedModel, sizes: Sizes, point: Point, memory_bytes: int | None, most_rows: int
) -> Iterator[Plan]:
    """Plan by what the caches are estimated to take."""
    device = model.device.type
    available = available_bytes(device)
    left = available if memory_bytes is None else memory_bytes - sum(w.nbytes for w in model.parameters())
    if left is None:
        raise InputError("the system does not tell how much memory is left; give --memory-gib.")
    if available is not None and left > available:
        raise InputError(
            f"--memory-gib leaves {left / 2**30:.1f} GiB for caches, but {available / 2**30:.1f} GiB are available; "
            "give less."
        )
    token_bytes = 2 * sizes.num_kv_heads * sizes.head_dim * model.dtype.itemsize
    budgets = [None, *point.token_budgets]
    for budget in budgets:
        config = dense_config(max(point.token_budgets)) if budget is None else sparse_config(budget)
        row_bytes = (sizes.num_layers + 1) * held_bytes(config, point.seq_len, token_bytes)  # a layer's tokens come in
        batch = min(most_rows, int(MARGIN * left / row_bytes))
        if batch < 1:
            raise InputError(
                f"one row of {point.seq_len} tokens takes {row_bytes / 2**30:.2f} GiB, but "
                f"{max(0, left) / 2**30:.2f} GiB are left beside the weights; lower --seq-len or give more memory."
            )
        yield Plan("dense" if budget is None else "rocketkv", config, budget, batch)


def _measure(model: PreTrainedModel, plan: Plan, point: Point, on_round: OnRound | None) -> Row:
    """Time a step of the plan's batch, or of a smaller one where a GPU has too little memory after all."""
    batch = plan.batch
    while True:
        try:
            step, cache = _step(model, plan.config, batch, point.seq_len)
            (times_ms,) = run_rounds({plan.name: step}, point.pace, on_round).values()
            backend = cache.compressed_layers[0].cache.backend
        except torch.OutOfMemoryError:
            if batch == 1:
                raise InputError(f"not even one row of {point.seq_len} tokens fits; lower --seq-len.") from None
            step, cache, batch = None, None, max(1, int(LESS * batch))
            torch.cuda.empty_cache()
            continue
        row = Row(plan.name, times_ms, cache_stats(cache).total.kv_bytes, point.seq_len, plan.token_budget, batch)
        row.details["tokens_per_second"] = 1000 * batch / row.median_ms
        row.details["backend"] = backend
        return row


def _step(
    model: PreTrainedModel, config: RocketKVConfig, batch: int, seq_len: int
) -> tuple[Callable[[], float], RocketKVCache]:
    """Return a call that times one step, with its cache, of which every layer has the same random tokens."""
    sizes, device = sizes_of(model), model.device.type
    shape = (batch, sizes.num_kv_heads, kept_tokens(config, seq_len), sizes.head_dim)
    keys = random_tokens(*shape, model.dtype, device)
    cache = our_cache(model, config, keys, keys, seq_len)
    del keys
    input_ids = torch.ones(batch, 1, dtype=torch.int64, device=device)
    for _ in range(2):  # the first step compiles, and on a GPU the second one captures
        decode_step(model, cache, input_ids)
    return lambda: timed(lambda: decode_step(model, cache, input_ids), device), cache
