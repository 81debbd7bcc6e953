"""Queries that attend to tokens after them, as those of an image may: in the reference against plain loops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from inputs import arrays, make_inputs, poisoned
from rocketkv import InputError, LayerCache, RocketKVConfig, backends, ops, snapshot, tensor_file
from rocketkv.ops import LogitTerms

LENGTHS = torch.tensor([[90, 80], [40, 33]])
COUNTS = torch.tensor([60, 21])
FULL = RocketKVConfig(dense_below=0, token_budget=16, window_size=8, mode="multi_turn")
SHARP: dict[str, Any] = {"window_size": 8, "kernel_size": 1, "selection": "hybrid", "eviction": "snapkv"}
UNLIKE = RocketKVConfig(dense_below=0, token_budget=9, mode="multi_turn", **SHARP)


def blocks(num_tokens: int, *spans: tuple[int, int]) -> torch.Tensor:
    """Return `[T]` int64: within each span, from the first to the last of it, tokens see each other."""
    ahead = torch.zeros(num_tokens, dtype=torch.int64)
    for first, last in spans:
        ahead[first : last + 1] = last - torch.arange(first, last + 1)
    return ahead


AHEAD = torch.stack([blocks(60, (5, 30), (31, 32), (50, 59)), blocks(60, (40, 47), (57, 58))])


@pytest.mark.parametrize("terms", [LogitTerms(), LogitTerms(torch.linspace(-3, 3, 6), 1.5)], ids=["none", "both"])
def test_attention_and_scores(seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch, terms: LogitTerms) -> None:
    monkeypatch.setattr("rocketkv.ops.attention.QUERY_BLOCK", 7)
    monkeypatch.setattr("rocketkv.ops.scores.BLOCK_ELEMENTS", 7 * 2 * 3 * 95)
    x = make_inputs(seeded, 2, 6, 2, 90, 64)
    keys, values, query = poisoned(x.key, LENGTHS), poisoned(x.value, LENGTHS), x.query[:, :, :60]
    options = {"lengths": LENGTHS, "num_queries": COUNTS, "scale": 0.125, "terms": terms._replace(ahead=AHEAD)}
    output = backends.prefill_densely(query, keys, values, **options)
    scores = backends.score_window(query, keys, **options)
    for row in range(2):
        real = int(COUNTS[row])
        for head in range(2):
            heads, count = slice(3 * head, 3 * head + 3), int(LENGTHS[row, head])
            q, k, v = arrays(query[row, heads, 60 - real :], x.key[row, head, :count], x.value[row, head, :count])
            expected = np.zeros(count)
            for g in range(3):
                sink = None if terms.sink_logits is None else float(terms.sink_logits[3 * head + g])
                for t in range(real):
                    seen = count - real + t + 1 + int(AHEAD[row, 60 - real + t])
                    weights = oracle.softmax(k[:seen] @ q[g, t] * 0.125, sink, terms.softcap)
                    expected[:seen] += weights
                    own = output[row, 3 * head + g, 60 - real + t]
                    np.testing.assert_allclose(own, weights @ v[:seen], atol=1e-5)
            np.testing.assert_allclose(scores[row, head, :count], expected, atol=1e-4)


def test_a_prompt_without_lengths_is_one_with_them(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 2, 4, 2, 60)
    options = {"scale": 0.1, "terms": LogitTerms(ahead=AHEAD)}
    whole = ops.prefill_densely(*x, **options)
    assert torch.equal(whole, ops.prefill_densely(*x, lengths=torch.full((2, 2), 60), **options))
    causal = ops.prefill_densely(*x, scale=0.1)
    sees_none = (AHEAD == 0)[:, None, :, None]
    torch.testing.assert_close(whole.where(sees_none, causal), causal)
    assert not torch.allclose(whole, causal, atol=0.1)


def test_forks_rows_and_files_score_as_the_prompt_did(seeded: torch.Generator, tmp_path: Path) -> None:
    x = make_inputs(seeded, 2, 4, 2, 70)
    x.key[:, :, 59] = x.query[:, ::2, 52:56].mean(2)  # takes the votes of those queries that see it
    terms = LogitTerms(ahead=AHEAD)
    first, other, causal = (LayerCache(config, keep_queries=8) for config in (FULL, UNLIKE, UNLIKE))
    for cache, own in ((first, terms), (other, terms), (causal, LogitTerms())):
        cache.prefill(*x.part(0, 60), terms=own)
    assert not torch.equal(other.positions, causal.positions)
    taken = snapshot.take(first)
    tensor_file.save(tmp_path / "layer", taken.tensors, {})
    _, tensors = tensor_file.load(tmp_path / "layer")
    loaded = snapshot.restore(FULL, 8, snapshot.Snapshot({**tensors}, taken.facts), torch.device("cpu"))
    for cache in (first, loaded):
        assert torch.equal(cache.fork(UNLIKE).positions, other.positions)
        cache.select_rows(torch.tensor([1]))
        assert torch.equal(cache.fork(UNLIKE).positions, other.positions[1:])
    alone = LayerCache(UNLIKE)
    alone.prefill(*x.row(1).part(0, 60), terms=terms.of_rows(slice(1, 2)))
    assert torch.equal(alone.positions, other.positions[1:])


@pytest.mark.parametrize(
    ("ahead", "message"),
    [
        (AHEAD[:, 1:], r"ahead=torch.int64 \[2, 59\] does not fit the queries; give torch.int64 \[2, 60\]"),
        (AHEAD.float(), "ahead=torch.float32"),
        ("all", "ahead='all' does not fit"),
        (AHEAD + 1, "ahead counts tokens that are not there; give 0 to T - 1 - t for query t of T"),
        (AHEAD - 1, "ahead counts tokens that are not there"),
    ],
)
def test_what_does_not_fit_is_refused(seeded: torch.Generator, ahead: object, message: str) -> None:
    cache = LayerCache(FULL)
    with pytest.raises(InputError, match=message):
        cache.prefill(*make_inputs(seeded, 2, 4, 2, 60), terms=LogitTerms(ahead=ahead))
    assert cache.num_seen == 0
