"""Scores of the window, and the choice of the best tokens, against plain loops."""

import numpy as np
import pytest
import torch

import oracle
from inputs import SIZES, arrays, make_inputs, poisoned
from rocketkv import ops
from rocketkv.eviction import Peak, SnapKV
from rocketkv.ops.scores import _cut, _cut_on_cpu


@pytest.mark.parametrize("by_peak", [False, True])
@pytest.mark.parametrize(("size", "group", "head_dim"), SIZES)
def test_window_scores(seeded: torch.Generator, size: int, group: int, head_dim: int, by_peak: bool) -> None:
    x = make_inputs(seeded, 1, 2 * group, 2, size, head_dim)
    window = min(32, size)
    scores = ops.score_window(
        x.query[:, :, -window:],
        x.key,
        lengths=torch.full((1, 2), size),
        num_queries=torch.tensor([window]),
        scale=head_dim**-0.5,
        by_peak=by_peak,
    )
    np.testing.assert_allclose(
        scores[0], oracle.window_scores(*(a[0] for a in arrays(x.query, x.key)), window, by_peak), atol=1e-4
    )


@pytest.mark.parametrize("by_peak", [False, True])
def test_window_scores_in_blocks_and_of_ragged_rows(
    seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch, by_peak: bool
) -> None:
    x = make_inputs(seeded, 2, 4, 2, 120, 64)
    lengths, num_queries = torch.tensor([[120, 100], [9, 9]]), torch.tensor([32, 5])
    monkeypatch.setattr("rocketkv.ops.scores.BLOCK_ELEMENTS", 7 * 2 * 2 * 125)  # seven queries at a time
    given = {"lengths": lengths, "num_queries": num_queries, "scale": 0.125, "by_peak": by_peak}
    scores = ops.score_window(x.query[:, :, -32:], poisoned(x.key, lengths), **given)
    for row, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        count, window = int(lengths[row, head]), int(num_queries[row])
        q, k = arrays(x.query[row, 2 * head : 2 * head + 2], x.key[row, [head], :count])
        np.testing.assert_allclose(scores[row, head, :count], oracle.window_scores(q, k, window, by_peak)[0], atol=1e-5)
        assert not scores[row, head, count:].any()


def best_by_loops(scores: list[float], end: int, count: int) -> list[int]:
    """Return the positions of the `count` best of the first `end` scores, ascending; of equal scores the later wins."""
    ordered = sorted(range(end), key=lambda position: (scores[position], position), reverse=True)
    return sorted(ordered[:count])


def test_top_mask_takes_the_best_of_the_candidates_and_the_later_of_equals() -> None:
    scores = torch.tensor([[[5.0, 1, 4, 9, 3], [1.0, 1, 1, 1, 1]]])
    mask = ops.topk_mask(scores, candidates=torch.tensor([[3, 5]]), num_tokens=torch.tensor([2]))
    assert mask.tolist() == [[[True, False, True, False, False], [False, False, False, True, True]]]
    for wanted, marked in ((0, [0, 0]), (9, [3, 5])):
        mask = ops.topk_mask(scores, candidates=torch.tensor([[3, 5]]), num_tokens=torch.tensor([wanted]))
        assert mask.sum(2).tolist() == [marked]


def test_top_mask_of_plateaus_is_the_same_alone_and_in_a_ragged_batch(seeded: torch.Generator) -> None:
    levels = torch.randint(0, 6, (3, 2, 90), generator=seeded) * torch.tensor([1e-30, 0.125, 0.0])[:, None, None]
    scores = torch.nn.functional.max_pool1d(levels, 7, stride=1, padding=3)
    candidates = torch.tensor([[90, 31], [0, 64], [17, 89]])
    num_tokens = torch.tensor([30, 25, 12])
    scores = scores.masked_fill(torch.arange(90) >= candidates[..., None], torch.nan)  # what lies beyond is never read
    together = ops.topk_mask(scores, candidates=candidates, num_tokens=num_tokens)
    for row, head in np.ndindex(3, 2):
        end, count = int(candidates[row, head]), int(num_tokens[row])
        alone = ops.topk_mask(
            scores[row : row + 1, head : head + 1, : max(1, end)],
            candidates=candidates[row : row + 1, head : head + 1],
            num_tokens=num_tokens[row : row + 1],
        )
        expected = best_by_loops(scores[row, head].tolist(), end, count)
        assert together[row, head].nonzero().flatten().tolist() == expected
        assert alone[0, 0].nonzero().flatten().tolist() == expected


def test_top_mask_puts_nan_above_infinity_and_takes_zeros_of_both_signs_for_equal() -> None:
    scores = torch.tensor([[[-0.0, 0.0, torch.inf, -torch.nan, 1.0, torch.nan, -0.0, torch.inf]]])
    marked = []
    for count in range(9):
        mask = ops.topk_mask(scores, candidates=torch.tensor([[7]]), num_tokens=torch.tensor([count]))
        marked.append(mask[0, 0].nonzero().flatten().tolist())
    every = [5, 3, 2, 4, 6, 1, 0]  # the last infinity is no candidate
    assert marked == [sorted(every[:count]) for count in range(9)]


def test_the_way_to_the_cut_on_other_devices_finds_the_same(seeded: torch.Generator) -> None:
    order = torch.randint(-1, 9, (3, 2, 90), dtype=torch.int32, generator=seeded)
    ranks = torch.tensor([1, 90, 30, 30, 7, 1]).view(3, 2, 1)
    expected = order.sort(descending=True).values.gather(2, ranks - 1)
    assert torch.equal(_cut(order, ranks), expected)
    assert torch.equal(_cut_on_cpu(order, ranks), expected)


def test_best_tokens_pin_and_break_ties_by_position() -> None:
    scores = torch.tensor([[[0.1, 0.3, 0.3, 0.3, 0.0, 0.2, 9.9]]])

    def chosen(top_k: int, sinks: int = 0, recents: int = 0, length: int = 6) -> list[int]:
        best = ops.choose_tokens(
            scores,
            lengths=torch.tensor([[length]]),
            top_k=torch.tensor([top_k]),
            sinks=torch.tensor([sinks]),
            recents=torch.tensor([recents]),
        )
        return sorted(best[0, 0, : min(top_k, length)].tolist())

    assert chosen(2) == [1, 2]
    assert chosen(4) == [1, 2, 3, 5]
    assert chosen(3, sinks=1) == [0, 1, 2]
    assert chosen(3, sinks=1, recents=2) == [0, 4, 5]
    assert chosen(9, length=3) == [0, 1, 2]


@pytest.mark.parametrize(("policy", "kept"), [(Peak, range(85, 148)), (SnapKV, range(69, 132))], ids=["peak", "snapkv"])
def test_stage_1_keeps_what_surrounds_a_token_that_a_query_looks_at(policy: type[SnapKV], kept: range) -> None:
    keys = torch.zeros(1, 1, 400, 8)
    keys[0, 0, 100] = 9.0
    counts = {
        "lengths": torch.tensor([[400]]),
        "num_queries": torch.tensor([4]),
        "num_tokens": torch.tensor([4 + len(kept)]),
    }
    stays = policy(4, 63).keep(torch.ones(1, 2, 4, 8), keys, **counts, scale=1.0)
    assert stays is not None
    assert stays[0, 0].nonzero().flatten().tolist() == [*kept, *range(396, 400)]
