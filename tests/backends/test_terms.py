"""Attention sinks and soft caps in every backend of the CPU, against the reference."""

import pytest
import torch

from inputs import Inputs, make_inputs
from layers import SCORINGS, check_steps, make_layer
from rocketkv import InputError, LayerCache, RocketKVConfig, ops
from rocketkv.backends import Backend, Scoring, Spec, cpp
from rocketkv.ops import LogitTerms

pytestmark = pytest.mark.usefixtures("two_threads")

every_term = pytest.mark.parametrize(
    ("has_sinks", "softcap", "dtype"),
    [(True, None, torch.bfloat16), (False, 1.5, torch.float16), (True, 0.7, torch.float32)],
)


def make_terms(generator: torch.Generator, num_heads: int, has_sinks: bool, softcap: float | None) -> LogitTerms:
    return LogitTerms(3 * torch.randn(num_heads, generator=generator) if has_sinks else None, softcap)


def skip_declined(backend: Backend) -> None:
    if reason := backend.decline(Spec("cpu", torch.float32, 64, has_terms=True)):
        assert "sinks" in reason
        pytest.skip(reason)


@every_term
@pytest.mark.parametrize("scoring", SCORINGS)
def test_steps_of_ragged_rows(
    backend: Backend, seeded: torch.Generator, scoring: str, dtype: torch.dtype, has_sinks: bool, softcap: float | None
) -> None:
    skip_declined(backend)
    for lengths, group, head_dim, options in (
        ([[1, 63]], 1, 64, {}),
        ([[150, 3, 20], [23, 24, 700]], 5, 20, {"sinks": 4, "recents": 5, "archived": True, "page_size": [1, 4]}),
        ([[130, 90]], 8, 96, {"int8": scoring != Scoring.EXACT, "dense_below": 100}),
    ):
        terms = make_terms(seeded, group * len(lengths[0]), has_sinks, softcap)
        sizes = {"group": group, "head_dim": head_dim, "dtype": dtype, "num_channels": head_dim // 3}
        check_steps(backend, make_layer(seeded, scoring, lengths, terms=terms, **sizes, **options), seeded, steps=2)


@every_term
def test_long_rows_are_shared_out(
    backend: Backend, seeded: torch.Generator, dtype: torch.dtype, has_sinks: bool, softcap: float | None
) -> None:
    skip_declined(backend)
    for scoring in (Scoring.DENSE, Scoring.LOWBIT):
        terms = make_terms(seeded, 3, has_sinks, softcap)
        layer = make_layer(seeded, scoring, [[3000]], head_dim=32, num_channels=9, top_k=700, terms=terms, dtype=dtype)
        check_steps(backend, layer, seeded, steps=1)


@pytest.mark.parametrize("terms", [LogitTerms(torch.tensor([50.0, -50.0] * 3)), LogitTerms(None, 1e-3)])
def test_large_and_small_terms(backend: Backend, seeded: torch.Generator, terms: LogitTerms) -> None:
    skip_declined(backend)
    for scoring in (Scoring.DENSE, Scoring.LOWBIT):
        check_steps(backend, make_layer(seeded, scoring, [[100, 90]], terms=terms), seeded)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_query_that_is_no_number_gives_no_number(backend: Backend, seeded: torch.Generator, scoring: str) -> None:
    skip_declined(backend)
    layer = make_layer(seeded, scoring, [[90, 90]], terms=LogitTerms(torch.zeros(6), 5.0))
    query, key = torch.randn(1, 6, 1, 64, generator=seeded), torch.randn(1, 2, 1, 64, generator=seeded)
    query[0, 1] = torch.nan
    output, _ = backend.bind(layer)(query, key, key)
    assert output[0, 1].isnan().all()
    assert output[0, 3:].isfinite().all()


def check_prompt(x: Inputs, **options: object) -> None:
    """The error against float64 is at most twice that of plain torch in the same dtype."""
    output = cpp.prefill_densely(*x, **options)
    exact = ops.prefill_densely(*(tensor.double() for tensor in x), **options)
    plain = ops.prefill_densely(*x, **options)
    limit = 2 * float((plain - exact).abs().max()) + 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert output.dtype == plain.dtype
    assert float((output - exact).abs().max()) <= limit


@every_term
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("size", "group", "head_dim"), [(1, 1, 64), (63, 3, 80), (300, 2, 7)])
def test_prompts(
    seeded: torch.Generator,
    dtype: torch.dtype,
    size: int,
    group: int,
    head_dim: int,
    has_sinks: bool,
    softcap: float | None,
) -> None:
    x = make_inputs(seeded, 2, 2 * group, 2, size, head_dim, dtype)
    terms = make_terms(seeded, 2 * group, has_sinks, softcap)
    check_prompt(x, scale=0.1, terms=terms)
    lengths = torch.randint(1, size + 1, (2, 2), generator=seeded)
    num_queries = lengths.amin(1)
    beyond = torch.arange(size) >= lengths[..., None]
    x = Inputs(x.query, *(y.masked_fill(beyond[..., None], torch.nan) for y in x[1:]))
    check_prompt(x, scale=0.1, terms=terms, lengths=lengths, num_queries=num_queries)


@pytest.mark.usefixtures("backend")
def test_prompts_of_large_and_of_no_logits(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 300, 64)
    x.query[..., 5] = 1.0
    x.key[:, :, :280, 5] = -torch.inf  # more than a tile of keys
    sinks = torch.tensor([500.0, -500.0, 0.0, 1.0])
    for terms in (LogitTerms(sinks), LogitTerms(sinks, 3.0)):
        check_prompt(x, scale=0.1, terms=terms)
        check_prompt(x._replace(key=x.key.nan_to_num(0.0, 0.0, 0.0) * 500), scale=0.1, terms=terms)


def test_sinks_that_do_not_fit_a_prompt_are_refused(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 30, 64)
    for sinks in (torch.zeros(3), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(InputError, match=r"give float32 \[4\]"):
            cpp.prefill_densely(*x, scale=0.1, terms=LogitTerms(sinks))


def test_sinks_given_as_another_tensor_are_read_at_once(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 60, 64)
    caches = [LayerCache(RocketKVConfig(token_budget=64, backend=name)) for name in ("auto", "reference")]
    for terms in (LogitTerms(torch.zeros(4, dtype=torch.bfloat16)), LogitTerms(torch.full((4,), 3.0), 2.0)):
        outputs = []
        for cache in caches:
            cache.reset()
            cache.prefill(*x.part(0, 50), terms=terms)
            outputs.append([cache.decode(*x.part(t, t + 1), terms=terms) for t in range(50, 55)])
            outputs[-1].append(cache.decode(*x.part(55, 56), terms=LogitTerms(torch.ones(4))))
            outputs[-1].append(cache.decode(*x.part(56, 57)))
        torch.testing.assert_close(*outputs)
