"""Attention stays what it is if keys are multiplied, and queries divided, by the same numbers; so must what is chosen.

Rotary embeddings let a pair of channels (here c and c + D / 2) be scaled together, in the weights of any model, without
a trace in what it computes. A method whose choice changes under this reads an accident of the weights. The factors are
powers of two, so that nothing is rounded and the law holds to the bit.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from conftest import Report
from inputs import Inputs, make_inputs
from rocketkv import LayerCache, RocketKVConfig, ops

OURS = [("peak", "lowbit"), ("snapkv", "hybrid"), ("streaming_llm", "lowbit"), ("keep_all", "hybrid"),
        ("keep_all", "exact"), ("snapkv", "dense"), ("streaming_llm", "dense")]  # fmt: skip
PUBLISHED = ["hybrid_paper", "sparq"]
TURNS = [(150, 110), (40, 60)]  # tokens of a prompt and of the answer, in which groups close and blocks fill


class Conversation(NamedTuple):
    outputs: Tensor  # [B, Hq, T, D]
    kept: list[list[int]]  # after each prompt, row by row and head by head
    attended: Tensor  # [steps, B, Hkv, T]


def scaled(x: Inputs, generator: torch.Generator, block: int = 1) -> Inputs:
    """The same keys and queries, pairs of channels scaled by random powers of two; `block` pairs at a time alike."""
    half = x.key.shape[3] // 2
    exponents = torch.randint(-4, 5, (half // block,), generator=generator).repeat_interleave(block).repeat(2)
    factors = (2.0**exponents).to(x.key.dtype)
    return Inputs(x.query / factors, x.key * factors, x.value)


def converse(x: Inputs, turns: list[tuple[int, int]] = TURNS, **options: Any) -> Conversation:
    """Some turns over a long and a short, left-padded row."""
    cache = LayerCache(RocketKVConfig(**{"token_budget": 40, "window_size": 16, "dense_below": 0, **options}))
    outputs, kept, attended, start = [], [], [], 0
    for prompt, new in turns:
        padding = torch.tensor([0, prompt // 2])[: x.key.shape[0]]
        outputs.append(cache.prefill(*x.part(start, start + prompt), padding=padding))
        kept.extend(cache.positions.flatten(0, 1).tolist())
        for t in range(start + prompt, start + prompt + new):
            mark = torch.zeros(*x.key.shape[:3], dtype=torch.bool)
            outputs.append(cache.decode(*x.part(t, t + 1), attended=mark))
            attended.append(mark)
        start += prompt + new
    return Conversation(torch.cat(outputs, 2), kept, torch.stack(attended))


def exact_inputs(generator: torch.Generator, head_dim: int, dtype: torch.dtype, batch: int = 2) -> Inputs:
    """Inputs of so few bits that no dtype rounds them, scaled or not."""
    num_tokens = sum(prompt + new for prompt, new in TURNS)
    x = make_inputs(generator, batch, 4, 2, num_tokens, head_dim)
    few_bits = (*((a * 16).round().clamp(-127, 127) / 16 for a in (x.query, x.key)), x.value)
    return Inputs(*(a.to(dtype) for a in few_bits))


def check(x: Inputs, y: Inputs, **options: Any) -> None:
    plain, other = converse(x, **options), converse(y, **options)
    assert plain.kept == other.kept
    assert torch.equal(plain.attended, other.attended)
    assert torch.equal(plain.outputs, other.outputs)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("eviction", "selection"), OURS)
def test_scaling_keys_and_queries_changes_no_bit(
    seeded: torch.Generator, eviction: str, selection: str, dtype: torch.dtype, mode: str, backend: str
) -> None:
    x = exact_inputs(seeded, 32, dtype)
    options = {"eviction": eviction, "selection": selection, "mode": mode, "backend": backend}
    check(x, scaled(x, seeded), **options)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("selection", PUBLISHED)
def test_the_published_choice_of_channels_does_not_obey(seeded: torch.Generator, selection: str, backend: str) -> None:
    x = exact_inputs(seeded, 32, torch.float32)
    plain, other = (converse(a, selection=selection, backend=backend) for a in (x, scaled(x, seeded)))
    assert plain.kept == other.kept  # by stage 1
    assert not torch.equal(plain.attended, other.attended)
    assert not torch.allclose(plain.outputs, other.outputs, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("selection", ["lowbit", "hybrid", "dense"])
def test_channels_that_share_a_step_in_8_bits_may_be_scaled_together(
    seeded: torch.Generator, selection: str, backend: str
) -> None:
    x = exact_inputs(seeded, 128, torch.bfloat16)
    check(x, scaled(x, seeded, block=32), selection=selection, backend=backend, kv_dtype="int8")


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_in_8_bits_a_scaled_output_moves_no_further_than_the_rounding_of_the_keys_lets_it(
    seeded: torch.Generator, backend: str, report: Report
) -> None:
    """Logits that move by d at most let each weight change by a factor of e**(2 d) at most."""
    x = exact_inputs(seeded, 64, torch.float32)
    y = scaled(x, seeded)
    factors = (y.key / x.key).nan_to_num(0.0).amax((0, 1, 2))
    options = {"kv_dtype": "int8", "backend": backend}
    plain, other = (converse(a, eviction="keep_all", selection="dense", **options) for a in (x, y))
    stored, scaled_stored = (ops.restore_tokens(*ops.quantize_tokens(a.key, a.value), a.key.dtype)[0] for a in (x, y))
    moved = (stored - scaled_stored / factors).repeat_interleave(2, 1)  # [B, Hq, T, D]
    first = TURNS[0][0]
    furthest = (x.query[:, :, first:] @ moved.transpose(2, 3)).abs().amax(3) * 64**-0.5  # of each query's logits
    bound = ((2 * furthest).exp() - 1)[..., None] * x.value.abs().amax() + 1e-5
    assert ((plain.outputs - other.outputs)[:, :, first:].abs() <= bound).all()
    change = (plain.outputs - other.outputs)[:, :, first:].norm() / plain.outputs[:, :, first:].norm()
    report(f"keys in 8 bits, channels scaled: outputs move by {change:.0%} ({backend})")
    assert change > 0
    kept, same = (converse(a, **options).kept[:4] for a in (x, y))  # a first prompt is scored as it comes
    assert kept == same
