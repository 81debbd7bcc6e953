"""Random wrong calls between right ones: a cache refuses each in a sentence and does not change."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rocketkv import LayerCache, RocketKVConfig
from rocketkv.errors import RocketKVError

NUM_CALLS = 500  # calls per seed, 10,000 in all
SEEDS = range(20)
NO_TENSORS: list[Any] = [None, 3, -1, 2.5, "text", [0], [[1.0]], (), {}, object, True, float("nan")]

TENSOR_CHANGES: list[Callable[[random.Random, Tensor], Any]] = [
    lambda r, x: x.to(r.choice([torch.float16, torch.bfloat16, torch.float64, torch.float32])),
    lambda r, x: x.to(r.choice([torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])),
    lambda r, x: x.to(r.choice([torch.float8_e4m3fn, torch.float8_e5m2])) if x.is_floating_point() else x.float(),
    lambda r, x: x.to("meta"),
    lambda r, x: x.narrow(d := r.randrange(x.dim()), 0, r.randrange(x.shape[d] + 1)),
    lambda r, x: torch.cat([x, x], r.randrange(x.dim())),
    lambda r, x: x.repeat_interleave(r.choice([2, 3]), r.randrange(x.dim())),
    lambda r, x: x[(0,) * r.randrange(1, x.dim() + 1)],
    lambda r, x: x.unsqueeze(r.randrange(x.dim() + 1)),
    lambda r, x: x.transpose(*r.sample(range(x.dim()), 2)) if x.dim() > 1 else x.flip(0),
    lambda r, x: x.contiguous().flatten(),
    lambda r, x: x[..., :1].expand(x.shape),
    lambda r, x: x.to_sparse(),
    lambda r, x: x.numpy() if x.dtype != torch.bfloat16 else x.tolist(),
    lambda r, x: x.clone().requires_grad_() if x.is_floating_point() else -x.int() - 1,
    lambda r, x: r.choice(NO_TENSORS),
]
NUMBERS: list[Any] = [
    0,
    -1,
    1,
    0.25,
    float("nan"),
    float("inf"),
    -0.5,
    "1",
    [1],
    True,
    1e-60,
    1e60,
    torch.ones(2),
    10**40,
]


class Conversation:
    """A cache, and a twin that receives the right calls only."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.batch, self.num_kv_heads = self.random.randint(1, 3), self.random.randint(1, 3)
        self.num_heads = self.num_kv_heads * self.random.randint(1, 5)
        self.head_dim = self.random.choice([3, 8, 16, 20, 33])
        self.dtype = self.random.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
        self.num_refused = self.num_made = 0
        self.start()

    def config(self) -> RocketKVConfig:
        mode = self.random.choice(["single_turn", "multi_turn"])
        selection = self.random.choice(["lowbit", "lowbit", "hybrid", "quest", "sparq", "exact", "dense"])
        return RocketKVConfig(
            token_budget=self.random.randint(8, 24),
            window_size=4,
            kernel_size=3,
            mode=mode,
            archive_on_host=mode == "multi_turn" and self.random.random() < 0.3,
            selection=selection,
            eviction=self.random.choice(["snapkv", "streaming_llm", "keep_all"]),
            kv_dtype=self.random.choice(["auto", "int8"]) if selection != "exact" else "auto",
            dense_below=self.random.choice([0, 0, None, 40]),
            new_tokens=self.random.choice([0, 0, 5]),
        )

    def start(self) -> None:
        """Begin anew with an empty cache."""
        self.cache = LayerCache(self.config(), keep_queries=self.random.choice([0, 4]))
        self.twin = self.cache.copy()

    def tokens(self, count: int) -> list[Tensor]:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        return [torch.randn(self.rows, n, count, self.head_dim).to(self.dtype) for n in heads]

    @property
    def rows(self) -> int:
        """Return the number of rows that the batch has now."""
        return self.batch if self.cache.working is None else self.cache.num_stored.shape[0]

    def right_call(self) -> tuple[str, list[Any], dict[str, Any]]:
        """Return a method and arguments that fit."""
        if self.cache.working is None:
            method = self.random.choice(["prefill", "load_tokens"])
        else:
            method = self.random.choice(["decode"] * 5 + ["prefill", "select_rows", "fork"])
        if method == "load_tokens":
            _, keys, values = self.tokens(count := self.random.randint(1, 80))
            more = 0 if self.cache.config.mode == "multi_turn" else self.random.randint(0, 9)
            return method, [keys, values], {"num_seen": count + more, "positions": torch.arange(count) + more}
        if method == "select_rows":
            return method, [torch.randint(self.rows, (self.random.randint(1, 3),))], {}
        if method == "fork":
            return method, [self.config()], {}
        if method == "prefill":
            count = self.random.randint(1, 60)
            padding = torch.randint(count, (self.rows,)) if self.random.random() < 0.5 else None
            return method, self.tokens(count), {"padding": padding, "scale": self.random.choice([None, 0.5])}
        self.cache.trace = self.twin.trace = self.random.random() < 0.3
        return method, self.tokens(1), {"scale": self.random.choice([None, None, 0.5])}

    def spoil(self, arguments: list[Any], options: dict[str, Any]) -> None:
        """Replace some arguments by others, most of which do not fit."""
        places: list[tuple[Any, Any]] = [(arguments, i) for i in range(len(arguments))]
        places += [(options, name) for name in options]
        change = self.random.choice(TENSOR_CHANGES)
        alike = self.random.random() < 0.3  # all tensors in the same way
        for holder, name in self.random.sample(places, 1) if not alike else places:
            value = holder[name]
            if isinstance(value, Tensor):
                holder[name] = change(self.random, value)
            elif not alike:
                holder[name] = self.random.choice(NUMBERS + NO_TENSORS)

    def step(self) -> None:
        """Make one call, right or wrong."""
        method, arguments, options = self.right_call()
        if is_spoilt := self.random.random() < 0.7:
            self.spoil(arguments, options)
        with torch.set_grad_enabled(self.random.random() < 0.5):
            self.make(method, arguments, options, is_spoilt)

    def make(self, method: str, arguments: list[Any], options: dict[str, Any], is_spoilt: bool) -> None:
        try:
            made = getattr(self.cache, method)(*arguments, **options)
        except RocketKVError:
            if not is_spoilt and method != "fork":  # a fork is refused where queries were not kept
                raise
            self.num_refused += 1
            return
        expected = getattr(self.twin, method)(*arguments, **options)
        self.num_made += 1
        assert self.cache.num_seen == self.twin.num_seen
        assert self.cache.row_seen == self.twin.row_seen
        assert self.cache.read_bytes == self.twin.read_bytes
        assert torch.equal(self.cache.positions, self.twin.positions)
        if isinstance(made, Tensor):
            torch.testing.assert_close(made, expected, rtol=0, atol=0, equal_nan=True)
        if isinstance(made, LayerCache):
            self.cache, self.twin = made, expected
        if method == "decode" and self.cache.trace:
            assert torch.equal(self.cache.last_attended, self.twin.last_attended)
        self.dtype = self.cache.dtype or self.dtype  # an earlier call may have set another dtype


@pytest.mark.filterwarnings("ignore:a row has grown so long")
@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_calls_are_refused_and_change_nothing(seed: int) -> None:
    conversation = Conversation(seed)
    for call in range(NUM_CALLS):
        conversation.step()
        if call % 50 == 49 or (conversation.cache.working is not None and conversation.cache.plan is None):
            conversation.start()
    assert conversation.num_refused > NUM_CALLS / 4
    assert conversation.num_made > NUM_CALLS / 8
