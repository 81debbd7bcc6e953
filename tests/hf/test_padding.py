"""Tests of reading the padding of a pass: counts, the order of columns, and what is refused."""

import pytest
import torch
from torch import Tensor

from rocketkv import InputError, UnsupportedError
from rocketkv.hf.padding import Padding, read
from rocketkv.hf.passes import check_positions


def mask_of(*rows: str) -> Tensor:
    return torch.tensor([[int(column) for column in row] for row in rows])


def test_without_a_mask_nothing_new_is_padded() -> None:
    assert read(None, 3, None, num_rows=2, num_new=2) == Padding()
    padding = read(None, 3, mask_of("011", "111").bool(), num_rows=2, num_new=2)
    assert (padding.counts, padding.order) == (None, None)
    assert torch.equal(padding.mask, mask_of("01111", "11111").bool())


def test_a_mask_of_ones_is_noted_and_asks_for_nothing() -> None:
    padding = read(mask_of("111", "111"), 1, None, num_rows=2, num_new=2)
    assert (padding.counts, padding.order) == (None, None)
    assert torch.equal(padding.mask, mask_of("111", "111").bool())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_left_padding_is_counted_row_by_row(dtype: torch.dtype) -> None:
    padding = read(mask_of("0011", "1111", "0001").to(dtype), 0, None, num_rows=3, num_new=4)
    assert padding.counts.tolist() == [2, 0, 3]
    assert padding.order is None
    assert padding.row(2).counts.tolist() == [3]


def test_columns_of_an_earlier_prompt_do_not_count() -> None:
    padding = read(mask_of("0111", "1111"), 2, mask_of("01", "11").bool(), num_rows=2, num_new=2)
    assert (padding.counts, padding.order) == (None, None)


def test_padding_after_a_token_is_ordered_to_the_left_and_tokens_keep_their_order() -> None:
    padding = read(mask_of("11" + "1001", "01" + "1111"), 2, mask_of("11", "01").bool(), num_rows=2, num_new=4)
    assert padding.counts.tolist() == [2, 0]
    assert padding.order.tolist() == [[1, 2, 0, 3], [0, 1, 2, 3]]
    assert padding.row(0).order.tolist() == [[1, 2, 0, 3]]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (mask_of("1111", "1111")[None], UnsupportedError, "two-dimensional attention_mask"),
        ({"full_attention": None}, UnsupportedError, "two-dimensional attention_mask"),
        (mask_of("111", "111"), InputError, "3 columns, but the cache has seen 2 and 2 are new; give 4"),
        (mask_of("1111"), InputError, "1 rows for 2; give as many"),
        (mask_of("1110", "1111"), UnsupportedError, "padded at the right"),
        (mask_of("1100", "1111"), UnsupportedError, "without a token among the 2 new columns"),
        (mask_of("0111", "1111"), UnsupportedError, "hides or reveals tokens"),
    ],
)
def test_other_masks_are_refused(mask: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(mask, 2, None, num_rows=2, num_new=2)


def test_positions_that_were_seen_are_refused() -> None:
    check_positions(torch.tensor([[5, 6], [3, 4]]), [5, 3], 2, None)
    check_positions(torch.tensor([[5, 6], [0, 3]]), [5, 3], 2, torch.tensor([0, 1]))
    check_positions(torch.zeros(3, 2, 2), [5, 3], 2, None)  # no numbers of tokens
    with pytest.raises(InputError, match=r"position_ids end at \[1, 4\], but the cache has seen \[5, 3\] tokens"):
        check_positions(torch.tensor([[0, 1], [3, 4]]), [5, 3], 2, None)
