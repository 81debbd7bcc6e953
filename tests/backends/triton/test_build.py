"""The kernels of a prefill against the reference operations: indices are built, windows are scored."""

import pytest
import torch

from layers import DTYPES
from rocketkv import ops
from rocketkv.backends import Spec, triton
from rocketkv.backends.triton import sizes
from rocketkv.index import LowBitIndex, PageIndex

if (reason := triton.decline(Spec("cpu", torch.float32, 64))) is not None:
    pytest.skip(f"{reason}; `make test-triton` runs these in the interpreter", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # masked lanes compute, too


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_bit_keys_are_built_as_by_the_reference(seeded: torch.Generator, dtype: torch.dtype) -> None:
    keys = torch.full((2, 3, 300, 48), torch.nan, dtype=dtype)[:, :, :250]  # a view, as of storage with room
    lengths = torch.tensor([[250, 64, 63], [128, 1, 200]])
    for row in range(2):
        for head in range(3):
            keys[row, head, : lengths[row, head]] = torch.randn(lengths[row, head], 48, generator=seeded).to(dtype)
    keys[0, 0, :64, 3], keys[0, 0, 64:100, 5] = 2.0, torch.inf
    built = []
    for build in (ops.build_lowbit, triton.build_lowbit):
        index = LowBitIndex(keys[:, :, :1], torch.ones_like(lengths))  # as empty as can be
        index.reserve(300)
        build(index.stored, keys, lengths)
        built.append(index.stored)
    for row in range(2):
        for head in range(3):
            num_closed, num_open = divmod(int(lengths[row, head]), ops.GROUP)
            for name in ("codes", "ranges"):
                mine, expected = (getattr(x, name)[row, head, 0, :, :num_closed] for x in built)
                torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)
            mine, expected = (x.open_keys[row, head, :, :num_open] for x in built)
            assert torch.equal(mine, expected)
    torch.testing.assert_close(*(x.spread for x in built), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pages", "head_dim"), [((1, 1), 7), ((3, 9), 48), ((1, 2), 80)])
def test_pages_are_built_as_by_the_reference(
    seeded: torch.Generator, pages: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    keys = torch.full((2, 3, 300, head_dim), torch.nan, dtype=dtype)[:, :, :250]
    lengths, page_size = torch.tensor([[250, 64, 63], [128, 1, 200]]), torch.tensor([pages] * 2).T[:, 0]  # a view
    for row in range(2):
        for head in range(3):
            some = torch.randn(lengths[row, head], head_dim, generator=seeded)
            keys[row, head, : lengths[row, head]] = some.to(dtype)
    keys[0, 0, 3, 3], keys[1, 2, 70, 5], keys[0, 0, 249, 0] = torch.nan, torch.inf, -torch.inf
    none = torch.zeros_like(lengths)
    own, expected = (PageIndex(keys[:, :, :1], none, page_size, weighted=True) for _ in range(2))
    for index, build in ((own, triton.build_pages), (expected, ops.build_pages)):
        index.reserve(300)
        build(index.stored, keys, lengths)
    for mine, reference in zip(own.buffers, expected.buffers, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("group", "window", "head_dim", "dtype"),
    [(1, 1, 64, torch.float32), (3, 8, 20, torch.bfloat16), (4, 32, 128, torch.float16), (5, 16, 80, torch.float32)],
)
def test_windows_are_scored_as_by_the_reference(
    seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch, group: int, window: int, head_dim: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(sizes, "LEAST_WINDOW_PART", 64)
    query = torch.randn(2, 2 * group, window, head_dim, generator=seeded).to(dtype)
    keys = torch.full((2, 2, 260, head_dim), torch.nan, dtype=dtype)[:, :, :215]
    lengths = torch.tensor([[215, window], [97, 130]])
    for row in range(2):
        for head in range(2):
            some = torch.randn(lengths[row, head], head_dim, generator=seeded)
            keys[row, head, : lengths[row, head]] = some.to(dtype)
    query[0, 0, -1, 0] = torch.nan  # worth nothing
    given = {"lengths": lengths, "num_queries": torch.tensor([window, max(1, window // 3)]), "scale": head_dim**-0.5}
    for by_peak in (False, True):
        expected = ops.score_window(query, keys.nan_to_num(), **given, by_peak=by_peak)
        scores = triton.score_window(query, keys, **given, by_peak=by_peak, terms=ops.NO_TERMS)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
