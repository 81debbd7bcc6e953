"""Tests of each operation against plain loops, on odd sizes, ragged rows, ties and poisoned memory."""

import numpy as np
import pytest
import torch

import oracle
from inputs import make_inputs
from rocketkv import ops
from rocketkv.index import LowBitIndex, PageIndex

SIZES = [(1, 1, 64), (63, 3, 80), (100, 4, 96), (257, 8, 128), (130, 2, 256)]  # S, G, D


def arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [x.double().numpy() for x in tensors]


def poisoned(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return a copy of `tokens` [B, Hkv, S, D] with NaN beyond the lengths and in spare room at the end."""
    spare = torch.cat([tokens, torch.zeros_like(tokens[:, :, :5])], dim=2)
    beyond = torch.arange(spare.shape[2]) >= lengths[..., None]
    return spare.masked_fill(beyond[..., None], torch.nan)


@pytest.mark.parametrize(("size", "group", "head_dim"), SIZES)
def test_dense_attention_is_causal_attention(seeded: torch.Generator, size: int, group: int, head_dim: int) -> None:
    x = make_inputs(seeded, 1, 2 * group, 2, size, head_dim)
    scale = head_dim**-0.5
    expected = oracle.dense(*(a[0] for a in arrays(*x)))
    np.testing.assert_allclose(ops.prefill_densely(*x, scale=scale)[0], expected, atol=1e-5)
    # the newest tokens only, by the general path
    new = max(1, size // 3)
    lengths = torch.full((1, 2), size)
    output = ops.prefill_densely(x.query[:, :, -new:], x.key, x.value, lengths=lengths, scale=scale)
    np.testing.assert_allclose(output[0], expected[:, -new:], atol=1e-5)


def test_dense_attention_of_ragged_rows_and_heads(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 3, 6, 2, 700, 64)
    lengths = torch.tensor([[700, 650], [40, 33], [600, 600]])
    num_queries = torch.tensor([600, 21, 300])
    output = ops.prefill_densely(
        x.query[:, :, :600],
        poisoned(x.key, lengths),
        poisoned(x.value, lengths),
        lengths=lengths,
        num_queries=num_queries,
        scale=0.125,
    )
    for row in range(3):
        real = int(num_queries[row])
        assert not output[row, :, : 600 - real].any()
        for head in range(2):
            heads, count = slice(3 * head, 3 * head + 3), int(lengths[row, head])
            q, k, v = arrays(
                x.query[row, heads, 600 - real : 600], x.key[row, [head], :count], x.value[row, [head], :count]
            )
            np.testing.assert_allclose(output[row, heads, 600 - real :], oracle.dense(q, k, v), atol=1e-5)


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


def test_top_mask_takes_the_best_of_the_candidates() -> None:
    scores = torch.tensor([[[5.0, 1, 4, 9, 3], [1.0, 1, 1, 1, 1]]])
    mask = ops.topk_mask(scores, candidates=torch.tensor([[3, 5]]), num_tokens=torch.tensor([2]))
    assert mask[0, 0].tolist() == [True, False, True, False, False]
    assert mask[0, 1].sum() == 2
    assert ops.topk_mask(scores, candidates=torch.tensor([[3, 5]]), num_tokens=torch.tensor([9])).sum(2).tolist() == [
        [3, 5]
    ]


@pytest.mark.parametrize(("size", "group", "head_dim"), SIZES)
@pytest.mark.parametrize("page_size", [1, 2, 3, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_page_logits(
    seeded: torch.Generator, size: int, group: int, head_dim: int, page_size: int, weighted: bool
) -> None:
    x = make_inputs(seeded, 1, 2 * group, 2, size, head_dim)
    lengths = torch.full((1, 2), size)
    pages = PageIndex(x.key, lengths, torch.tensor([page_size]), weighted=weighted)
    query = x.query[:, :, -1].reshape(1, 2, group, head_dim)
    num_channels = max(1, head_dim // 3)
    hybrid = ops.score_tokens(
        ops.hybrid_logits(
            query,
            pages.bounds,
            page_size=pages.page_size,
            num_tokens=size,
            num_channels=torch.tensor([num_channels]),
            scale=head_dim**-0.5,
            spread=pages.spread,
        ),
        lengths,
    )
    quest = ops.score_tokens(
        ops.bound_logits(query, pages.bounds, page_size=pages.page_size, num_tokens=size, scale=head_dim**-0.5), lengths
    )
    for head in range(2):
        q, k = arrays(query[0, head], x.key[0, head])
        spread = oracle.spread(k, 32 * page_size) if weighted and size > 1 else 1.0
        expected = oracle.hybrid_token_scores(q, k, page_size, num_channels, spread)
        np.testing.assert_allclose(hybrid[0, head], expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(quest[0, head], oracle.quest_token_scores(q, k, page_size), rtol=1e-3, atol=1e-6)


def test_quest_bounds_every_dot_product_from_above(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 8, 2, 101, 64)
    pages = PageIndex(x.key, torch.full((1, 2), 101), torch.tensor([4]))
    query = torch.randn(1, 2, 4, 64, generator=seeded)
    bound = ops.bound_logits(query, pages.bounds, page_size=pages.page_size, num_tokens=101, scale=1.0)
    assert (bound >= query @ x.key.transpose(2, 3) - 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_extended_index_equals_a_rebuilt_one_at_every_step(seeded: torch.Generator, dtype: torch.dtype) -> None:
    x = make_inputs(seeded, 3, 4, 2, 150, 32, dtype)
    page_size = torch.tensor([1, 3, 4])
    lengths = torch.tensor([[10, 12], [3, 3], [7, 1]])
    grown = PageIndex(x.key[:, :, :12], lengths, page_size, weighted=True)
    everything = poisoned(x.key, lengths)
    for step in range(100):
        key = x.key[:, :, 20 + step : 21 + step]
        for row in range(3):
            for head in range(2):
                everything[row, head, lengths[row, head]] = key[row, head, 0]
        grown.extend(key, lengths)
        lengths = lengths + 1
        rebuilt = PageIndex(everything, lengths, page_size, weighted=True)
        for row in range(3):
            for head in range(2):
                pages = -(-int(lengths[row, head]) // int(page_size[row]))
                mine, theirs = (index.bounds[row, head].transpose(0, 1).flatten(1) for index in (grown, rebuilt))
                assert torch.equal(mine[:, :pages], theirs[:, :pages])
        assert torch.equal(grown.spread, rebuilt.spread)


def test_pages_of_one_token_are_stored_once(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 2, 2, 500, 64)
    lengths = torch.full((1, 2), 500)
    single = PageIndex(x.key, lengths, torch.tensor([1]))
    pairs = PageIndex(x.key, lengths, torch.tensor([2]))
    assert single.num_bytes < 1.2 * x.key.nbytes
    assert pairs.num_bytes < 1.3 * x.key.nbytes


def test_a_zero_query_chooses_without_nan(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 2, 1, 50, 64)
    lengths = torch.full((1, 1), 50)
    pages = PageIndex(x.key, lengths, torch.tensor([2]))
    logits = ops.hybrid_logits(
        torch.zeros(1, 1, 2, 64),
        pages.bounds,
        page_size=pages.page_size,
        num_tokens=50,
        num_channels=torch.tensor([8]),
        scale=0.125,
    )
    scores = ops.score_tokens(logits, lengths)
    torch.testing.assert_close(scores, torch.full((1, 1, 50), 1 / 50))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "group", "head_dim"), SIZES)
def test_sparse_attention(seeded: torch.Generator, dtype: torch.dtype, size: int, group: int, head_dim: int) -> None:
    x = make_inputs(seeded, 1, 2 * group, 2, size, head_dim, dtype)
    counts = torch.tensor([[max(1, size // 4), max(1, size // 2)]])
    slots = torch.stack([torch.randperm(size, generator=seeded) for _ in range(2)])[None, :, : int(counts.max())]
    query = x.query[:, :, -1:]
    output = ops.decode_sparsely(query, x.key, x.value, slots=slots, counts=counts, scale=head_dim**-0.5)
    for head in range(2):
        heads = slice(group * head, group * head + group)
        chosen = slots[0, head, : int(counts[0, head])].tolist()
        expected = oracle.attend(*arrays(query[0, heads, 0], x.key[0, head], x.value[0, head]), chosen)
        plain = torch.nn.functional.scaled_dot_product_attention(
            query[:, heads], *(a[:, [head]][:, :, chosen].expand(-1, group, -1, -1) for a in (x.key, x.value))
        )
        own_error = float((plain[0, :, 0].double() - torch.from_numpy(expected)).norm())
        error = float((output[0, heads, 0].double() - torch.from_numpy(expected)).norm())
        assert error <= 2 * own_error + 1e-6  # no worse than twice torch's own error in this dtype


def test_dense_decode_ignores_what_lies_beyond(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 2, 4, 2, 80, 64)
    lengths = torch.tensor([[80, 60], [1, 33]])
    output = ops.decode_densely(
        x.query[:, :, -1:], poisoned(x.key, lengths), poisoned(x.value, lengths), lengths=lengths, scale=0.125
    )
    for row, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        heads, count = slice(2 * head, 2 * head + 2), int(lengths[row, head])
        expected = oracle.attend(
            *arrays(x.query[row, heads, -1], x.key[row, head], x.value[row, head]), list(range(count))
        )
        np.testing.assert_allclose(output[row, heads, 0], expected, atol=1e-5)


def test_pages_are_built_from_sizes_and_lengths_that_are_views(seeded: torch.Generator) -> None:
    keys = torch.randn(3, 2, 90, 16, generator=seeded)
    sizes, lengths = torch.tensor([[2, 9], [3, 9], [4, 9]]), torch.tensor([[90, 0, 50], [7, 0, 8], [33, 0, 90]])
    built = PageIndex(keys, lengths[:, ::2], sizes[:, 0])
    plain = PageIndex(keys, lengths[:, ::2].clone(), sizes[:, 0].clone())
    assert torch.equal(built.bounds, plain.bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_bit_keys_are_as_near_as_four_bits_allow(seeded: torch.Generator, dtype: torch.dtype) -> None:
    keys = (torch.randn(2, 3, ops.GROUP, 80, generator=seeded) * 5 + torch.arange(80)).to(dtype)
    keys[..., 7] = 3.0  # a channel whose keys are all alike
    codes, ranges = ops.quantize_groups(keys)
    assert codes.shape == (2, 3, 80, ops.GROUP // 2)
    assert ranges.dtype == dtype
    low, step = ranges.float().unbind(-1)
    steps = torch.cat([codes & 15, codes >> 4], -1)
    near = (low[..., None] + step[..., None] * steps).transpose(-2, -1)
    rounding = torch.finfo(dtype).eps * 15 * step  # of the step itself
    assert ((near - keys.float()).abs() <= (step / 2 + rounding + 1e-6)[..., None, :]).all()
    assert (steps.amax(-1) == 15).sum() == 6 * 79  # every channel's range is used but of those all alike
    assert torch.equal(near[..., 7], keys[..., 7].float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 20])
def test_numbers_in_8_bits(seeded: torch.Generator, head_dim: int, dtype: torch.dtype) -> None:
    rows = (torch.randn(2, 3, 5000, head_dim, generator=seeded) * torch.logspace(-6, 3, 5000)[:, None]).to(dtype)
    rows[0, 0, 0] = 0.0
    least = -24 if dtype == torch.float16 else -126
    codes, values, exponents = ops.quantize_tokens(rows, -rows)
    assert torch.equal(codes, -values)
    restored, _ = ops.dequantize_tokens(codes, values, exponents, dtype)
    for row in (0, 1, 2500, 4999):
        for start in range(0, head_dim, 32):
            block = rows[1, 2, row, start : start + 32].double().numpy()
            step = 2.0 ** max(np.floor(np.log2(np.abs(block).max())) - 6, least)
            expected = np.clip(np.round(block / step), -127, 127) * step
            np.testing.assert_array_equal(restored[1, 2, row, start : start + 32].double().numpy(), expected)
    again = ops.quantize_tokens(restored, -restored)
    assert all(torch.equal(*pair) for pair in zip((codes, values, exponents), again, strict=True))


def test_what_is_not_finite_is_restored_as_no_number() -> None:
    rows = torch.ones(1, 1, 4, 64)
    rows[0, 0, 0, 3], rows[0, 0, 1, 40], rows[0, 0, 2, 0] = torch.nan, torch.inf, -torch.tensor(torch.nan)
    restored, _ = ops.dequantize_tokens(*ops.quantize_tokens(rows, rows), rows.dtype)
    isnan = restored[0, 0].isnan()
    assert isnan[[0, 2], :32].all()
    assert isnan[1, 32:].all()
    assert int(isnan.sum()) == 3 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_bit_keys_grow_into_what_they_are_when_built_anew(seeded: torch.Generator, dtype: torch.dtype) -> None:
    keys = torch.randn(2, 2, 1200, 64, generator=seeded).to(dtype)
    lengths = torch.tensor([[960, 64], [1, 127]])
    index = LowBitIndex(poisoned(keys[:, :, :960], lengths), lengths)
    for _ in range(200):
        rows = lengths[..., None, None].expand(-1, -1, 1, 64)
        index.extend(keys.gather(2, rows), lengths)
        lengths = lengths + 1
    again = LowBitIndex(poisoned(keys[:, :, : int(lengths.max())], lengths), lengths)
    assert_alike(index, again, lengths)
    rows = torch.tensor([1, 1, 0])
    for both in (index, again):
        both.select_rows(rows)
        both.extend(torch.ones(3, 2, 1, 64, dtype=dtype), lengths[rows])
    assert_alike(index, again, lengths[rows] + 1)


def assert_alike(index: LowBitIndex, other: LowBitIndex, lengths: torch.Tensor) -> None:
    """Check that whole groups and open tokens are equal; memory beyond may differ."""
    for row in range(lengths.shape[0]):
        for head in range(lengths.shape[1]):
            whole, left = divmod(int(lengths[row, head]), ops.GROUP)
            for one, two in zip(index.stored[:2], other.stored[:2], strict=True):
                groups = [x[row, head].transpose(1, 2).flatten(0, 1)[:whole] for x in (one, two)]
                assert torch.equal(*groups)
            assert torch.equal(*(x.stored.open_keys[row, head, :, :left] for x in (index, other)))
    assert torch.equal(index.stored.spread, other.stored.spread)


@pytest.mark.parametrize(("size", "group", "head_dim"), SIZES)
def test_low_bit_logits_are_those_of_the_plain_loop(
    seeded: torch.Generator, size: int, group: int, head_dim: int
) -> None:
    x = make_inputs(seeded, 1, 2 * group, 2, size, head_dim)
    index = LowBitIndex(x.key, torch.full((1, 2), size))
    query = x.query[:, :, -1].reshape(1, 2, group, head_dim)
    num_channels = max(1, head_dim // 3)
    logits = ops.lowbit_logits(
        query,
        index.stored,
        lengths=torch.full((1, 2), size),
        num_tokens=size,
        num_channels=torch.tensor([num_channels]),
        scale=0.5,
    )
    for head in range(2):
        q, k = arrays(query[0, head], x.key[0, head])
        expected = oracle.lowbit_logits(q, k, num_channels, ops.GROUP, oracle.spread(k, ops.GROUP)) * 0.5
        np.testing.assert_allclose(logits[0, head], expected, atol=1e-3)


def test_more_bytes_of_low_bit_keys_tell_more(seeded: torch.Generator) -> None:
    """Low-bit keys read along all channels rank tokens almost as the keys themselves do."""
    x = make_inputs(seeded, 1, 2, 2, 1000, 64)
    index, scale = LowBitIndex(x.key, torch.full((1, 2), 1000)), 1 / 8
    exact = x.query[:, :, -1:] @ x.key.transpose(2, 3) * scale
    options = {"lengths": torch.full((1, 2), 1000), "num_tokens": 1000, "scale": scale}
    errors = [
        (ops.lowbit_logits(x.query[:, :, -1:], index.stored, num_channels=torch.tensor([n]), **options) - exact).std()
        for n in (8, 16, 32, 64)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * exact.std()
