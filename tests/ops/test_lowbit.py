"""Low-bit keys, built, extended and scored, against plain loops."""

import numpy as np
import pytest
import torch

import oracle
from inputs import SIZES, arrays, make_inputs, poisoned
from rocketkv import ops
from rocketkv.index import LowBitIndex


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
    """Whole groups and open tokens are the same, what is beyond may differ."""
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
    """Read along all channels they rank tokens almost as the keys themselves do."""
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
