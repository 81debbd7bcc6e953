"""A model of a `LayerCache` in plain lists of tokens."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rocketkv import LayerCache, RocketKVConfig

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 16
Positions = list[list[list[int]]]  # of each row, of each KV head


@dataclass
class Row:
    """Everything that a row has seen: the token at position p is the p-th of each list."""

    keys: list[Tensor] = field(default_factory=list)  # [Hkv, D] each
    values: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def first(self, count: int) -> "Row":
        return Row(self.keys[:count], self.values[:count])

    def add(self, key: Tensor, value: Tensor) -> None:
        """Take in key and value `[Hkv, T, D]` of T tokens."""
        self.keys += key.unbind(1)
        self.values += value.unbind(1)


@dataclass
class Model:
    """What is known of a cache without looking at it."""

    config: RocketKVConfig
    rows: list[Row] = field(default_factory=list)
    num_seen: int = 0
    num_decoded: int = 0  # since the last prefill
    awaits_prompt: bool = True
    kept: Positions = field(default_factory=list)  # what decode chooses from; of no use while a prompt is awaited

    def copy(self) -> "Model":
        rows = [row.first(len(row)) for row in self.rows]
        kept = [[list(head) for head in row] for row in self.kept]
        return Model(self.config, rows, self.num_seen, self.num_decoded, self.awaits_prompt, kept)

    @property
    def tolerance(self) -> dict[str, float]:
        return {"rtol": 0.1, "atol": 0.15} if self.config.kv_dtype == "int8" else {"rtol": 1e-3, "atol": 1e-4}

    def attends_to_all(self, row: Row) -> bool:
        """Whether a decode step of this row attends to everything that is kept of it."""
        return self.config.selection == "dense" or len(row) <= self.config.token_budget


def attention(query: Tensor, row: Row, past: list[list[int]], num_new: int) -> Tensor:
    """Attention of the last queries `[Hq, T, D]` to `past`, by KV head, and causally to the row's last T tokens."""
    keys, values = torch.stack(row.keys, 1).double(), torch.stack(row.values, 1).double()
    group, outputs = NUM_HEADS // NUM_KV_HEADS, []
    for head in range(NUM_HEADS):
        kv_head, seen = head // group, len(row) - num_new
        at = torch.tensor(past[kv_head] + list(range(seen, len(row))))
        logits = query[head].double() @ keys[kv_head, at].T * HEAD_DIM**-0.5
        allowed = at <= torch.arange(seen, len(row))[:, None]
        outputs.append(logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ values[kv_head, at])
    return torch.stack(outputs).float()


def positions_of(cache: LayerCache) -> Positions:
    """The positions that a cache tells, checked: ascending, as many as it says, -1 beyond them."""
    found: Positions = []
    for row, counts in zip(cache.positions.tolist(), cache.num_stored.tolist(), strict=True):
        for head, count in zip(row, counts, strict=True):
            assert head[:count] == sorted(set(head[:count]))
            assert head[0] >= 0
            assert set(head[count:]) <= {-1}
        found.append([head[:count] for head, count in zip(row, counts, strict=True)])
    return found
