"""Attention sinks and soft caps in the reference, against plain loops."""

import numpy as np
import pytest
import torch

import oracle
from inputs import SIZES, arrays, make_inputs, poisoned
from rocketkv import ops
from rocketkv.ops import LogitTerms

TERMS = [(True, None), (False, 1.5), (True, 0.7)]  # whether there are sinks, and the soft cap


def make_terms(generator: torch.Generator, num_heads: int, has_sinks: bool, softcap: float | None) -> LogitTerms:
    return LogitTerms(3 * torch.randn(num_heads, generator=generator) if has_sinks else None, softcap)


def numbers(terms: LogitTerms) -> tuple[np.ndarray | None, float | None]:
    return None if terms.sink_logits is None else terms.sink_logits.double().numpy(), terms.softcap


@pytest.mark.parametrize(("has_sinks", "softcap"), TERMS)
@pytest.mark.parametrize(("size", "group", "head_dim"), SIZES)
def test_dense_attention(
    seeded: torch.Generator, size: int, group: int, head_dim: int, has_sinks: bool, softcap: float | None
) -> None:
    x = make_inputs(seeded, 1, 2 * group, 2, size, head_dim)
    terms = make_terms(seeded, 2 * group, has_sinks, softcap)
    expected = oracle.dense(*(a[0] for a in arrays(*x)), *numbers(terms))
    options = {"scale": head_dim**-0.5, "terms": terms}
    np.testing.assert_allclose(ops.prefill_densely(*x, **options)[0], expected, atol=1e-5)
    last = ops.decode_densely(x.query[:, :, -1:], *x[1:], lengths=None, **options)
    np.testing.assert_allclose(last[0], expected[:, -1:], atol=1e-5)


@pytest.mark.parametrize(("has_sinks", "softcap"), TERMS)
def test_ragged_rows_in_blocks_and_chosen_tokens(
    seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch, has_sinks: bool, softcap: float | None
) -> None:
    monkeypatch.setattr("rocketkv.ops.attention.BLOCK_LOGITS", 7 * 3 * 6 * 125)  # seven queries at a time
    x = make_inputs(seeded, 3, 6, 2, 120, 64)
    lengths, num_queries = torch.tensor([[120, 110], [40, 33], [100, 100]]), torch.tensor([60, 21, 30])
    terms = make_terms(seeded, 6, has_sinks, softcap)
    sinks, cap = numbers(terms)
    options = {"scale": 0.125, "terms": terms}
    keys, values = poisoned(x.key, lengths), poisoned(x.value, lengths)
    query = x.query[:, :, :60]
    output = ops.prefill_densely(query, keys, values, lengths=lengths, num_queries=num_queries, **options)
    slots = torch.stack([torch.randperm(33, generator=seeded) for _ in range(6)]).view(3, 2, 33)
    counts = torch.tensor([[1, 33], [9, 2], [20, 20]])
    sparse = ops.decode_sparsely(query[:, :, -1:], keys, values, slots=slots, counts=counts, **options)
    for row in range(3):
        real = int(num_queries[row])
        assert not output[row, :, : 60 - real].any()
        for head in range(2):
            heads, count = slice(3 * head, 3 * head + 3), int(lengths[row, head])
            own = None if sinks is None else sinks[heads]
            q, k, v = arrays(query[row, heads, 60 - real :], x.key[row, [head], :count], x.value[row, [head], :count])
            np.testing.assert_allclose(output[row, heads, 60 - real :], oracle.dense(q, k, v, own, cap), atol=1e-5)
            chosen = slots[row, head, : int(counts[row, head])].tolist()
            expected = oracle.attend(q[:, -1], k[0], v[0], chosen, own, cap)
            np.testing.assert_allclose(sparse[row, heads, 0], expected, atol=1e-5)


@pytest.mark.parametrize("by_peak", [False, True])
@pytest.mark.parametrize(("has_sinks", "softcap"), TERMS)
def test_scores_of_the_window_and_of_tokens(
    seeded: torch.Generator, has_sinks: bool, softcap: float | None, by_peak: bool
) -> None:
    x = make_inputs(seeded, 2, 6, 2, 120, 64)
    lengths, num_queries = torch.tensor([[120, 100], [9, 9]]), torch.tensor([32, 5])
    terms = make_terms(seeded, 6, has_sinks, softcap)
    sinks, cap = numbers(terms)
    given = {"lengths": lengths, "num_queries": num_queries, "scale": 0.125, "terms": terms, "by_peak": by_peak}
    keys = poisoned(x.key, lengths)
    scores = ops.score_window(x.query[:, :, -32:], keys, **given)
    logits = (x.query[:, :, -1].view(2, 2, 3, 64) @ keys.transpose(2, 3)) * 0.125
    of_tokens = ops.score_tokens(logits, lengths, terms)
    for row, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        count, window = int(lengths[row, head]), int(num_queries[row])
        own = None if sinks is None else sinks[3 * head : 3 * head + 3]
        q, k = arrays(x.query[row, 3 * head : 3 * head + 3], x.key[row, [head], :count])
        expected = oracle.window_scores(q, k, window, by_peak, own, cap)[0]
        np.testing.assert_allclose(scores[row, head, :count], expected, atol=1e-5)
        given_weights = [
            oracle.softmax(k[0] @ q[g, -1] * 0.125, None if own is None else own[g], cap) for g in range(3)
        ]
        np.testing.assert_allclose(of_tokens[row, head, :count], np.mean(given_weights, axis=0), atol=1e-6)
        assert not scores[row, head, count:].any()
        assert not of_tokens[row, head, count:].any()


def test_a_sink_without_weight_and_a_cap_without_effect_change_nothing(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 50, 64)
    terms = LogitTerms(torch.full((4,), -torch.inf), 1e6)
    torch.testing.assert_close(ops.prefill_densely(*x, scale=0.1, terms=terms), ops.prefill_densely(*x, scale=0.1))


def test_a_logit_that_is_no_number_takes_all_of_its_heads_score() -> None:
    logits = torch.tensor([[[[0.5, torch.nan, 2.0], [0.0, 0.0, 0.0]]]])
    scores = ops.score_tokens(logits, torch.tensor([[3]]), LogitTerms(torch.tensor([9.0, 0.0]), 1.0))
    torch.testing.assert_close(scores, torch.tensor([[[0.125, 0.625, 0.125]]]))
