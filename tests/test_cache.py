import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rocketkv.cache import WorkingSet
from rocketkv.formats import FORMATS
from rocketkv.ragged import Kept, RaggedTokens, align_left


def poison(tokens: RaggedTokens) -> None:
    """Fill everything beyond the lengths with NaN, so that a read of it shows."""
    for field in tokens.fields.values():
        if field.is_floating_point():
            beyond = torch.arange(field.shape[2]) >= tokens.lengths[..., None]
            field[beyond] = torch.nan


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 90), st.lists(st.integers(0, 89), min_size=2, max_size=2)), min_size=1, max_size=5
    )
)
def test_append_keeps_every_rows_tokens_in_order(chunks: list[tuple[int, list[int]]]) -> None:
    store = RaggedTokens.empty_like(
        {"floats": torch.empty(2, 3, 0, 4), "integers": torch.empty(2, 3, 0, dtype=torch.int32)}
    )
    expected: list[list[int]] = [[], []]
    first = 0
    for width, missing in chunks:
        counts = torch.tensor([max(0, width - m) for m in missing])
        numbers = torch.arange(first, first + width, dtype=torch.int32)
        floats = numbers.float()[:, None].expand(2, 3, -1, 4)
        store.append({"floats": floats, "integers": numbers.expand(2, 3, -1)}, counts)
        for row in range(2):
            expected[row] += range(first, first + int(counts[row]))
        first += width
        assert store.max_length == max(map(len, expected))
    poison(store)
    floats, integers = store.views()["floats"], store.views()["integers"]
    for row in range(2):
        count = len(expected[row])
        assert store.lengths[row].tolist() == [count] * 3
        assert integers[row, 1, :count].tolist() == expected[row]
        assert floats[row, 2, :count, 3].tolist() == expected[row]


def test_append_rarely_allocates() -> None:
    store = RaggedTokens.empty_like({"keys": torch.empty(1, 1, 0, 8)})
    capacities = set()
    for _ in range(1000):
        store.append({"keys": torch.zeros(1, 1, 1, 8)})
        capacities.add(store.fields["keys"].shape[2])
    assert len(capacities) - 1 < 20  # the number of times that tokens moved; the first allocation moves none


def test_keep_takes_each_heads_tokens_in_order(seeded: torch.Generator) -> None:
    tokens = torch.arange(20.0).expand(1, 2, -1)[..., None]
    store = RaggedTokens({"keys": tokens}, torch.full((1, 2), 20))
    mask = torch.rand(1, 2, 20, generator=seeded) < 0.4
    kept = store.keep(Kept(mask, mask.sum(2)))
    for head in range(2):
        count = int(mask[0, head].sum())
        assert kept.lengths[0, head] == count
        assert kept.views()["keys"][0, head, :count, 0].tolist() == mask[0, head].nonzero()[:, 0].tolist()
    assert kept.is_ragged == (len(set(kept.lengths[0].tolist())) > 1)


def test_align_left_moves_padding_to_the_end() -> None:
    tokens = torch.arange(5.0).expand(2, 1, -1)[..., None]
    moved = align_left(tokens, torch.tensor([2, 0]))
    assert moved[0, 0, :3, 0].tolist() == [2, 3, 4]
    assert moved[1, 0, :, 0].tolist() == [0, 1, 2, 3, 4]


def test_the_archive_is_not_copied_by_the_working_set() -> None:
    key = torch.randn(1, 2, 1000, 64)
    working = WorkingSet(key, FORMATS["auto"], archived=True)
    seen = working.append_prompt(key, key, None)
    working.keep(seen, Kept(torch.arange(1000).expand(1, 2, -1) < 300, torch.full((1, 2), 300)), 0)
    full = 2 * key.nbytes
    assert full <= working.num_bytes <= 1.1 * full
    keys, _ = working.keys_and_values()
    torch.testing.assert_close(keys, key[:, :, :300])


@pytest.mark.parametrize("archived", [False, True])
def test_select_rows_repeats_and_drops(archived: bool) -> None:
    key = torch.randn(3, 2, 10, 4)
    working = WorkingSet(key, FORMATS["auto"], archived=archived)
    working.keep(working.append_prompt(key, key, torch.tensor([0, 4, 2])), None, 0)
    working.select_rows(torch.tensor([2, 2]))
    assert working.row_seen == [8, 8]
    assert working.lengths.tolist() == [[8, 8], [8, 8]]
    torch.testing.assert_close(working.keys_and_values()[0][1, :, :8], key[2, :, 2:])
