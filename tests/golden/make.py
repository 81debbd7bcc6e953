"""Four small conversations of one layer, and the numbers that this project's reference path computed for them.

`python tests/golden/make.py` writes `cases.npz` beside this file anew; only a deliberate change of the method calls for
that. For case c and turn t the file has
- `kept_c_t` int16 `[B, Hkv, N]`: positions that stage 1 kept, ascending, -1 beyond a row's end;
- `prompt_c_t` float32 `[B, Hq, D]`: the dense output of the turn's last prompt token;
- `out_c_t` float32 `[B, steps, Hq, D]`: the output of each decode step.
The inputs are made of whole numbers, so that every version of torch makes the same.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rocketkv import LayerCache, RocketKVConfig

FILE = Path(__file__).with_name("cases.npz")
SMALL: dict[str, Any] = {"window_size": 16, "kernel_size": 7, "dense_below": 0}
CASES: list[dict[str, Any]] = [  # turns: prompt tokens, decode steps; padding: of the second row in each turn, if any
    {"config": RocketKVConfig(token_budget=24, **SMALL), "turns": [(300, 10)]},
    {"config": RocketKVConfig.paper(48, window_size=16, kernel_size=7), "turns": [(300, 10)]},
    {
        "config": RocketKVConfig(token_budget=16, mode="multi_turn", **SMALL),
        "turns": [(250, 6), (40, 6)],
        "padding": 30,
    },
    {"config": RocketKVConfig(token_budget=16, kv_dtype="int8", **SMALL), "turns": [(300, 10)]},
]
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64


def numbers(seed: int, *shape: int) -> Tensor:
    """Return float32 numbers from -3 to 3, nearly normal: sums of twelve numbers of a linear generator."""
    count = int(np.prod(shape))
    state = torch.arange(12 * count, dtype=torch.int64) + 1_000_003 * (seed + 1)
    for _ in range(3):
        state = (state * 1_103_515_245 + 12_345) & 0x7FFF_FFFF
        state = state ^ (state >> 13)
    parts = (state & 0xFFFF).view(12, count).sum(0)
    return (parts.double() / 0x1_0000 - 6).clamp(-3, 3).float().view(shape)


def make_inputs(case: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return query `[B, Hq, T, D]`, keys and values `[B, Hkv, T, D]`; queries resemble earlier keys."""
    total = sum(prompt + new for prompt, new in CASES[case]["turns"])
    batch = 2 if "padding" in CASES[case] else 1
    keys, values = (numbers(10 * case + i, batch, NUM_KV_HEADS, total, HEAD_DIM) for i in (1, 2))
    keys[..., ::16] *= 4  # channels that stand out
    source = (torch.arange(total) * 7_919) % torch.arange(1, total + 1)
    echo = keys[:, :, source].repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 1)
    return numbers(10 * case, batch, NUM_HEADS, total, HEAD_DIM) + 0.5 * echo, keys, values


def run(case: int, backend: str = "auto") -> dict[str, Tensor]:
    """Return the arrays of one case, by name."""
    inputs, found, at = make_inputs(case), {}, 0
    cache = LayerCache(replace(CASES[case]["config"], backend=backend))
    for turn, (prompt, new) in enumerate(CASES[case]["turns"]):
        padding = torch.tensor([0, CASES[case]["padding"]]) if "padding" in CASES[case] else None
        output = cache.prefill(*(x[:, :, at : at + prompt] for x in inputs), padding=padding)
        at += prompt
        found[f"kept_{case}_{turn}"] = cache.positions.short()
        found[f"prompt_{case}_{turn}"] = output[:, :, -1]
        steps = [cache.decode(*(x[:, :, t : t + 1] for x in inputs)) for t in range(at, at + new)]
        found[f"out_{case}_{turn}"] = torch.cat(steps, 2).transpose(1, 2)
        at += new
    return found


def main() -> None:
    """Write the file anew, by the reference."""
    arrays = {name: x.numpy() for case in range(len(CASES)) for name, x in run(case, "reference").items()}
    np.savez_compressed(FILE, **arrays)  # type: ignore[arg-type] # its options have the last word


if __name__ == "__main__":
    main()
