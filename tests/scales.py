"""Inputs and conversations whose keys are multiplied, and queries divided, by the same powers of two."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from inputs import Inputs, make_inputs
from rocketkv import LayerCache, RocketKVConfig
from rocketkv.ops import NO_TERMS, LogitTerms

TURNS = [(150, 50), (60, 30)]  # tokens of a prompt and of the answer: groups close, blocks fill, a second prompt evicts


class Conversation(NamedTuple):
    outputs: Tensor  # [B, Hq, T, D]
    kept: list[list[int]]  # after each prompt, row by row and head by head
    attended: Tensor  # [steps, B, Hkv, T]


def scaled(x: Inputs, generator: torch.Generator, block: int = 1) -> Inputs:
    """Scale pairs of channels of the same keys and queries by random powers of two, `block` pairs at a time alike."""
    half = x.key.shape[3] // 2
    exponents = torch.randint(-4, 5, (half // block,), generator=generator).repeat_interleave(block).repeat(2)
    factors = (2.0**exponents).to(x.key.dtype)
    return Inputs(x.query / factors, x.key * factors, x.value)


def converse(
    x: Inputs, turns: list[tuple[int, int]] = TURNS, terms: LogitTerms = NO_TERMS, **options: Any
) -> Conversation:
    """Run some turns over a long row and a short, left-padded row."""
    cache = LayerCache(RocketKVConfig(**{"token_budget": 40, "window_size": 16, "dense_below": 0, **options}))
    cache.trace = True
    outputs, kept, attended, start = [], [], [], 0
    for prompt, new in turns:
        padding = torch.tensor([0, prompt // 2])[: x.key.shape[0]]
        outputs.append(cache.prefill(*x.part(start, start + prompt), padding=padding, terms=terms))
        kept.extend(cache.positions.flatten(0, 1).tolist())
        for t in range(start + prompt, start + prompt + new):
            outputs.append(cache.decode(*x.part(t, t + 1), terms=terms))
            assert cache.last_attended is not None
            attended.append(pad(cache.last_attended, (0, x.key.shape[2] - cache.last_attended.shape[2])))
        start += prompt + new
    return Conversation(torch.cat(outputs, 2), kept, torch.stack(attended))


def exact_inputs(generator: torch.Generator, head_dim: int, dtype: torch.dtype, batch: int = 2) -> Inputs:
    """Return inputs of so few bits that no dtype rounds them, scaled or not."""
    num_tokens = sum(prompt + new for prompt, new in TURNS)
    x = make_inputs(generator, batch, 4, 2, num_tokens, head_dim)
    few_bits = (*((a * 16).round().clamp(-127, 127) / 16 for a in (x.query, x.key)), x.value)
    return Inputs(*(a.to(dtype) for a in few_bits))


def check(x: Inputs, y: Inputs, **options: Any) -> None:
    plain, other = converse(x, **options), converse(y, **options)
    assert plain.kept == other.kept
    assert torch.equal(plain.attended, other.attended)
    assert torch.equal(plain.outputs, other.outputs)
