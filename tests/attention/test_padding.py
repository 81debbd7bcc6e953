"""Tests that a row of a padded batch decodes as it does alone, whatever rows come and go beside it."""

import pytest
import torch

from caches import WITH_8_BITS, decode_all, strict
from inputs import Inputs, make_inputs
from rocketkv import LayerCache, RocketKVConfig
from rocketkv.selection import SELECTION_METHODS

pytestmark = pytest.mark.usefixtures("decoded_by")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("eviction", "selection", "kv_dtype"), WITH_8_BITS)
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_padded_rows_are_what_they_are_alone(
    seeded: torch.Generator, mode: str, eviction: str, selection: str, kv_dtype: str
) -> None:
    x = make_inputs(seeded, 4, 6, 2, 400, 64)
    methods = {"eviction": eviction, "selection": selection, "kv_dtype": kv_dtype}
    config = strict(token_budget=48, mode=mode, window_size=16, kernel_size=7, **methods)
    padding = torch.tensor([0, 130, 345, 180])  # the third row fits in the budget
    batch = LayerCache(config)
    batch_prompt = batch.prefill(*x.part(0, 380), padding=padding)
    positions, stored = batch.positions, batch.num_stored.clone()
    batch_new = decode_all(batch, x, 380, 400)
    for row, pad in enumerate(padding.tolist()):
        alone, y = LayerCache(config), x.row(row, start=pad)
        prompt = alone.prefill(*y.part(0, 380 - pad))
        torch.testing.assert_close(batch_prompt[row, :, pad:], prompt[0], rtol=1e-4, atol=1e-5)
        assert not batch_prompt[row, :, :pad].any()
        for head in range(2):
            count = int(alone.num_stored[0, head])
            assert stored[row, head] == count
            assert positions[row, head, :count].tolist() == alone.positions[0, head].tolist()
            assert (positions[row, head, count:] == -1).all()
        new = decode_all(alone, y, 380 - pad, 400 - pad)
        torch.testing.assert_close(batch_new[row], new[0], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_padded_later_turns_are_what_they_are_alone(seeded: torch.Generator, mode: str, kv_dtype: str) -> None:
    x = make_inputs(seeded, 2, 4, 2, 500, 64)
    config = strict(token_budget=40, mode=mode, window_size=16, kernel_size=7, kv_dtype=kv_dtype)
    turns = [(0, 300, (0, 120), 8), (308, 60, (25, 0), 8), (376, 9, (0, 3), 5)]  # start, width, padding, new tokens
    batch = LayerCache(config)
    outputs = []
    for start, width, padding, new in turns:
        outputs.append(batch.prefill(*x.part(start, start + width), padding=torch.tensor(padding)))
        outputs.append(decode_all(batch, x, start + width, start + width + new))
    for row in range(2):
        alone = LayerCache(config)
        for turn, (start, width, padding, new) in enumerate(turns):
            pad = padding[row]
            prompt = alone.prefill(*(a[row : row + 1] for a in x.part(start + pad, start + width)))
            torch.testing.assert_close(outputs[2 * turn][row, :, pad:], prompt[0], rtol=1e-3, atol=1e-4)
            part = Inputs(*(a[row : row + 1] for a in x))
            tokens = decode_all(alone, part, start + width, start + width + new)
            torch.testing.assert_close(outputs[2 * turn + 1][row], tokens[0], rtol=1e-3, atol=1e-4)
        assert batch.row_seen[row] == alone.row_seen[0]


@pytest.mark.parametrize("selection", ["exact", "quest", "sparq", "hybrid", "hybrid_paper"])
def test_a_batch_reads_what_its_rows_read_alone(seeded: torch.Generator, selection: str) -> None:
    x = make_inputs(seeded, 2, 4, 2, 420, 64)
    config = strict(token_budget=128, selection=selection)
    batch = LayerCache(config)
    batch.prefill(*x.part(0, 400), padding=torch.tensor([0, 290]))
    rows = [LayerCache(config), LayerCache(config)]
    for row, (cache, pad) in enumerate(zip(rows, (0, 290), strict=True)):
        cache.prefill(*x.row(row, pad).part(0, 400 - pad))
    for t in range(400, 420):
        batch.decode(*x.part(t, t + 1))
        for row, cache in enumerate(rows):
            cache.decode(*x.row(row).part(t, t + 1))
        if selection != "quest" or t < 418:  # the short row's page of one token is then indexed with both bounds
            assert batch.read_bytes == sum(cache.read_bytes for cache in rows), t


@pytest.mark.parametrize("selection", list(SELECTION_METHODS))
def test_a_row_that_stays_when_longer_ones_go_selects_as_it_does_alone(
    decoded_by: str, seeded: torch.Generator, selection: str
) -> None:
    """Alone it is attended in full at first, and selects later; the index must not have missed what came between."""
    x = make_inputs(seeded, 2, 4, 2, 800, 64)
    config = RocketKVConfig.paper(256, eviction="keep_all", selection=selection, new_tokens=200)
    batch, alone = LayerCache(config), LayerCache(config)
    batch.prefill(*x.part(0, 600), padding=torch.tensor([450, 0]))
    alone.prefill(*x.row(0, start=450).part(0, 150))
    batch.decode(*x.part(600, 601))
    alone.decode(*x.row(0).part(600, 601))
    batch.select_rows(torch.tensor([0]))
    mine, expected = (decode_all(cache, x.row(0), 601, 760) for cache in (batch, alone))
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)


def test_select_rows_is_a_batch_of_those_rows(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 3, 4, 2, 300, 64)
    padding = torch.tensor([0, 50, 200])
    for mode in ("single_turn", "multi_turn"):
        config = strict(token_budget=40, window_size=16, kernel_size=7, mode=mode)
        cache = LayerCache(config)
        cache.prefill(*x.part(0, 280), padding=padding)
        decode_all(cache, x, 280, 285)
        cache.select_rows(torch.tensor([2, 0, 0]))
        chosen = Inputs(*(a[[2, 0, 0]] for a in x))
        expected = LayerCache(config)
        expected.prefill(*chosen.part(0, 280), padding=padding[[2, 0, 0]])
        decode_all(expected, chosen, 280, 285)
        torch.testing.assert_close(
            decode_all(cache, chosen, 285, 300), decode_all(expected, chosen, 285, 300), rtol=1e-4, atol=1e-5
        )
