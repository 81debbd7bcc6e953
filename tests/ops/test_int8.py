"""Numbers in 8 bits with shared exponents, against plain loops."""

import numpy as np
import pytest
import torch

from rocketkv import ops


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
