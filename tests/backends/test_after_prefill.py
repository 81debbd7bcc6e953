"""What follows a prompt's attention on the CPU, stage 1's scores and the low-bit index, against plain torch."""

import pytest
import torch
from torch import Tensor

from inputs import make_inputs, poisoned
from layers import DTYPES
from rocketkv import backends, ops
from rocketkv.backends import cpp
from rocketkv.errors import InputError
from rocketkv.index import LowBitIndex

pytestmark = pytest.mark.usefixtures("backend", "two_threads")

# tokens, group, window, head_dim
SIZES = [(1, 1, 1, 64), (40, 3, 32, 20), (257, 5, 16, 80), (2500, 2, 7, 96), (1100, 4, 32, 128), (300, 8, 40, 256)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "group", "window", "head_dim"), SIZES)
def test_windows_of_ragged_and_padded_rows(
    seeded: torch.Generator, size: int, group: int, window: int, head_dim: int, dtype: torch.dtype
) -> None:
    x = make_inputs(seeded, 2, 2 * group, 2, size, head_dim, dtype)
    least = max(1, window // 3)
    lengths, num_queries = torch.tensor([[size, max(window, size // 2)], [least, size]]), torch.tensor([window, least])
    query, keys = x.query[:, :, size - window :], poisoned(x.key, lengths)
    query[0, 0, -1, 0] = torch.nan  # worth nothing
    given = {"lengths": lengths, "num_queries": num_queries, "scale": head_dim**-0.5}
    assert backends.fastest("score_window", keys) is cpp.score_window
    for by_peak in (False, True):
        expected = ops.score_window(query.double(), keys.nan_to_num().double(), **given, by_peak=by_peak)
        scores = cpp.score_window(query, keys, **given, by_peak=by_peak)
        assert not scores[torch.arange(keys.shape[2]).expand_as(scores) >= lengths[..., None]].any()
        torch.testing.assert_close(scores, expected.float(), rtol=1e-4, atol=1e-5)
        for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            alone = cpp.score_window(
                query[row, None, head * group : (head + 1) * group, window - int(num_queries[row]) :],
                keys[row, None, head, None, : int(lengths[row, head])],
                lengths=lengths[row, None, head, None],
                num_queries=num_queries[row, None],
                scale=head_dim**-0.5,
                by_peak=by_peak,
            )
            assert torch.equal(alone[0, 0], scores[row, head, : alone.shape[2]])


@pytest.mark.parametrize(("sinks", "softcap"), [(True, None), (False, 2.0), (True, 30.0)])
def test_sinks_take_their_part_and_logits_are_capped(
    seeded: torch.Generator, sinks: bool, softcap: float | None
) -> None:
    x = make_inputs(seeded, 2, 6, 2, 1100, 64)
    sink_logits = torch.randn(6, generator=seeded) * 3 if sinks else None
    terms = ops.LogitTerms(sink_logits, softcap)
    given = {"lengths": torch.tensor([[1100, 900], [40, 33]]), "num_queries": torch.tensor([32, 20]), "scale": 0.2}
    for by_peak in (False, True):
        expected = ops.score_window(x.query[:, :, -32:], x.key, **given, by_peak=by_peak, terms=terms)
        scores = cpp.score_window(x.query[:, :, -32:], x.key, **given, by_peak=by_peak, terms=terms)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_peak", [False, True])
def test_the_number_of_threads_changes_no_score(seeded: torch.Generator, by_peak: bool) -> None:
    x = make_inputs(seeded, 1, 3, 1, 3000, 64)
    scores = []
    for num_threads in (1, 2, 7):
        torch.set_num_threads(num_threads)
        lengths, num_queries = torch.full((1, 1), 3000), torch.tensor([32])
        scores.append(
            cpp.score_window(
                x.query[:, :, -32:], x.key, lengths=lengths, num_queries=num_queries, scale=0.1, by_peak=by_peak
            )
        )
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_keys_that_are_no_numbers_are_scored_as_by_the_reference(seeded: torch.Generator, value: float) -> None:
    x = make_inputs(seeded, 1, 6, 2, 1500, 64)
    x.key[0, 1, 7, 5], x.key[0, 1, 1490, 6] = value, value  # the first queries of the window do not see the second
    given = {"lengths": torch.full((1, 2), 1500), "num_queries": torch.tensor([32]), "scale": 0.1}
    expected = ops.score_window(x.query[:, :, -32:], x.key, **given)
    torch.testing.assert_close(cpp.score_window(x.query[:, :, -32:], x.key, **given), expected, rtol=1e-4, atol=1e-5)


def test_a_window_that_does_not_fit_is_refused(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 6, 2, 50, 64)
    with pytest.raises(InputError, match=r"lengths=\[\[50, 51\]\] must be 0 to 50"):
        cpp.score_window(
            x.query, x.key, lengths=torch.tensor([[50, 51]]), num_queries=torch.tensor([50]), scale=0.1, by_peak=True
        )


def empty_index(keys: Tensor, num_tokens: int) -> LowBitIndex:
    index = LowBitIndex(keys[:, :, :1], torch.ones(keys.shape[:2], dtype=torch.int64))  # as empty as can be
    index.reserve(num_tokens)
    return index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [7, 48, 128])
def test_low_bit_keys_are_built_as_by_the_reference(seeded: torch.Generator, head_dim: int, dtype: torch.dtype) -> None:
    lengths = torch.tensor([[1100, 64, 63], [128, 0, 1090]])
    keys = poisoned(torch.randn(2, 3, 1100, head_dim, generator=seeded).to(dtype), lengths)[:, :, :1101]  # a view
    keys[0, 0, :64, 3], keys[0, 0, 64:100, 5], keys[0, 0, 130, 6] = 2.0, torch.inf, torch.nan
    assert backends.fastest("build_lowbit", keys) is cpp.build_lowbit
    own, expected = empty_index(keys, 1200).stored, empty_index(keys, 1200).stored
    cpp.build_lowbit(own, keys, lengths)
    ops.build_lowbit(expected, keys, lengths)
    for row, head in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        num_closed, num_open = divmod(int(lengths[row, head]), ops.GROUP)
        for name in ("codes", "ranges"):
            mine, reference = (
                getattr(x, name)[row, head].transpose(0, 1).flatten(1, 2)[:, :num_closed] for x in (own, expected)
            )
            torch.testing.assert_close(mine[:, :num_closed], reference[:, :num_closed], rtol=0, atol=0, equal_nan=True)
        mine, reference = (x.open_keys[row, head, :, :num_open] for x in (own, expected))
        assert torch.equal(mine, reference)
    torch.testing.assert_close(own.spread, expected.spread, rtol=0, atol=0, equal_nan=True)
