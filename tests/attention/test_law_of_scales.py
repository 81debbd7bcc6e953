"""Attention does not change if keys are multiplied and queries divided by the same numbers; nor may the choice.

Rotary embeddings let a pair of channels (here c and c + D / 2) be scaled together, in the weights of any model, without
a trace in what it computes. A method whose choice changes under this reads an accident of the weights. The factors are
powers of two, so that nothing is rounded and the law holds to the bit.
"""

from collections.abc import Callable

import pytest
import torch

from rocketkv import ops
from scales import TURNS, check, converse, exact_inputs, scaled

OURS = [("peak", "lowbit"), ("snapkv", "hybrid"), ("streaming_llm", "lowbit"), ("keep_all", "hybrid"),
        ("keep_all", "exact"), ("snapkv", "dense"), ("streaming_llm", "dense")]  # fmt: skip
PUBLISHED = ["hybrid_paper", "sparq"]


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


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_law_holds_with_sinks_and_a_soft_cap(seeded: torch.Generator, backend: str) -> None:
    x = exact_inputs(seeded, 32, torch.bfloat16)
    check(x, scaled(x, seeded), backend=backend, terms=ops.LogitTerms(torch.randn(4, generator=seeded), 1.5))


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
    seeded: torch.Generator, backend: str, report: Callable[[str], None]
) -> None:
    """Logits that move by d at most let each weight change by a factor of e**(2 d) at most."""
    x = exact_inputs(seeded, 64, torch.float32)
    y = scaled(x, seeded)
    factors = (y.key / x.key).nan_to_num(0.0).amax((0, 1, 2))
    options = {"kv_dtype": "int8", "backend": backend}
    plain, other = (converse(a, eviction="keep_all", selection="dense", **options) for a in (x, y))
    stored, scaled_stored = (
        ops.dequantize_tokens(*ops.quantize_tokens(a.key, a.value), a.key.dtype)[0] for a in (x, y)
    )
    moved = (stored - scaled_stored / factors).repeat_interleave(2, 1)  # [B, Hq, T, D]
    first = TURNS[0][0]
    furthest = (x.query[:, :, first:] @ moved.transpose(2, 3)).abs().amax(
        3
    ) * 64**-0.5  # the most by which a query's logits move
    bound = ((2 * furthest).exp() - 1)[..., None] * x.value.abs().amax() + 1e-5
    assert ((plain.outputs - other.outputs)[:, :, first:].abs() <= bound).all()
    change = (plain.outputs - other.outputs)[:, :, first:].norm() / plain.outputs[:, :, first:].norm()
    report(f"keys in 8 bits, channels scaled: outputs move by {change:.0%} ({backend})")
    assert change > 0
    kept, same = (converse(a, **options).kept[:4] for a in (x, y))  # stage 1 scores a first prompt's keys as they come
    assert kept == same
