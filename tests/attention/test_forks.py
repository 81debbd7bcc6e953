"""Tests that a fork of a shared prefill equals a cache that has seen everything itself."""

import pytest
import torch

from caches import WITH_8_BITS, decode_all, strict
from inputs import Inputs, make_inputs
from rocketkv import InputError, LayerCache
from rocketkv.selection import SELECTION_METHODS

pytestmark = pytest.mark.usefixtures("decoded_by")


def test_a_fork_answers_as_if_it_had_seen_everything_itself(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 420, 64)
    shared = LayerCache(strict(token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense"))
    shared.prefill(*x.part(0, 368))
    for selection in SELECTION_METHODS:
        config = strict(token_budget=48, mode="multi_turn", selection=selection)
        fork, alone = shared.fork(config), LayerCache(config)
        fork.prefill(*x.part(368, 400))
        alone.prefill(*x.part(0, 400))
        assert torch.equal(fork.positions, alone.positions)
        torch.testing.assert_close(decode_all(fork, x, 400, 420), decode_all(alone, x, 400, 420), rtol=1e-4, atol=1e-5)
    assert shared.num_seen == 368
    with pytest.raises(InputError, match="nothing was prefilled since this cache was made or forked"):
        shared.fork(config).decode(*x.part(368, 369))
    empty = LayerCache(config).fork(config)
    assert torch.equal(empty.prefill(*x), LayerCache(config).prefill(*x))
    with pytest.raises(InputError, match="a single_turn cache cannot be forked: tokens were evicted; set mode='multi"):
        LayerCache(strict(token_budget=48)).fork(config)


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize("prompt", [400, 40])
def test_a_fork_with_kept_queries_is_to_the_bit_a_cache_that_prefilled_by_itself(
    seeded: torch.Generator, mode: str, prompt: int
) -> None:
    x = make_inputs(seeded, 2, 4, 2, 460, 64)
    padding = torch.tensor([0, 30])
    dense = strict(token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense")
    shared = LayerCache(dense, keep_queries=16)
    shared.prefill(*x.part(0, prompt), padding=padding)
    held = {name: field.clone() for name, field in shared.working.archive.views().items()}
    for eviction, selection, kv_dtype in WITH_8_BITS:
        methods = {"eviction": eviction, "selection": selection, "kv_dtype": kv_dtype}
        config = strict(token_budget=24, mode=mode, window_size=16, **methods)
        fork, alone = shared.fork(config), LayerCache(config)
        alone.prefill(*x.part(0, prompt), padding=padding)
        assert torch.equal(fork.positions, alone.positions)
        assert (fork.kv_bytes, fork.num_seen, fork.row_seen) == (alone.kv_bytes, alone.num_seen, alone.row_seen)
        assert torch.equal(decode_all(fork, x, prompt, prompt + 8), decode_all(alone, x, prompt, prompt + 8))
        following = x.part(prompt + 8, prompt + 40)  # this is the next turn
        assert torch.equal(fork.prefill(*following), alone.prefill(*following))
        assert torch.equal(fork.positions, alone.positions)
        end = prompt + 40, prompt + 44
        assert torch.equal(decode_all(fork, x, *end), decode_all(alone, x, *end))
    assert all(torch.equal(held[name], field) for name, field in shared.working.archive.views().items())


def test_a_fork_at_a_later_turn_sees_all_of_the_past(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 460, 64)
    shared = LayerCache(
        strict(token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense"), keep_queries=16
    )
    shared.prefill(*x.part(0, 300))
    shared.prefill(*x.part(300, 400))
    for eviction, selection, kv_dtype in WITH_8_BITS:
        methods = {"eviction": eviction, "selection": selection, "kv_dtype": kv_dtype}
        config = strict(token_budget=48, mode="multi_turn", window_size=16, **methods)
        fork, alone = shared.fork(config), LayerCache(config)
        alone.prefill(*x.part(0, 300))
        alone.prefill(*x.part(300, 400))
        assert torch.equal(decode_all(fork, x, 400, 408), decode_all(alone, x, 400, 408))
    single = strict(token_budget=48, window_size=16)
    with pytest.raises(InputError, match="would have evicted at an earlier prefill already; fork after the first"):
        shared.fork(single)
    everything = strict(token_budget=48, window_size=16, eviction="keep_all")
    alone = LayerCache(everything)
    alone.prefill(*x.part(0, 400))
    assert torch.equal(decode_all(shared.fork(everything), x, 400, 420), decode_all(alone, x, 400, 420))
    with pytest.raises(
        InputError, match="window_size=17 is more than the keep_queries=16 of this cache; make the cache with"
    ):
        shared.fork(strict(token_budget=48, window_size=17))
    decode_all(shared, x, 400, 401)
    with pytest.raises(InputError, match="needs the last queries of a prefill; make this cache with keep_queries"):
        shared.fork(single)


def test_a_fork_of_chosen_rows_is_a_batch_of_those_rows(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 3, 4, 2, 420, 64)
    shared = LayerCache(
        strict(token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense"), keep_queries=16
    )
    shared.prefill(*x.part(0, 400))
    shared.select_rows(torch.tensor([2, 0]))
    chosen = Inputs(*(a[[2, 0]] for a in x))
    config = strict(token_budget=48, window_size=16)
    fork, alone = shared.fork(config), LayerCache(config)
    alone.prefill(*chosen.part(0, 400))
    assert torch.equal(decode_all(fork, chosen, 400, 420), decode_all(alone, chosen, 400, 420))


def test_a_fork_of_chosen_rows_takes_in_their_next_turn(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 2, 4, 2, 460, 64)
    config = strict(token_budget=48, mode="multi_turn")
    shared = LayerCache(config)
    shared.prefill(*x.part(0, 400))
    shared.select_rows(torch.tensor([1, 1, 0]))
    chosen = Inputs(*(a[[1, 1, 0]] for a in x))
    fork, alone = shared.fork(config), LayerCache(config)
    alone.prefill(*chosen.part(0, 400))
    assert torch.equal(fork.prefill(*chosen.part(400, 450)), alone.prefill(*chosen.part(400, 450)))
    assert torch.equal(decode_all(fork, chosen, 450, 460), decode_all(alone, chosen, 450, 460))
