"""The CUDA kernels, run on the CPU, against the reference: odd, ragged, tied and poisoned storage.

The kernels are compiled for each dtype, group, head_dim and scoring, so most tests share those of `make_layer`.
"""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.cuda.emulator import Emulated, Emulator
from layers import DTYPES, SCORINGS, check_8_bits_of_extremes, check_steps, make_layer
from rocketkv.backends import Scoring
from rocketkv.backends.cuda import step as cuda_step
from rocketkv.index import LowBitIndex
from rocketkv.ops import LogitTerms

SIZES = [(1, 1, 64), (63, 3, 80), (100, 4, 96), (257, 9, 128), (130, 5, 256), (70, 2, 7)]  # tokens, G, D


@pytest.mark.parametrize("number", range(15))
def test_odd_sizes(seeded: torch.Generator, number: int) -> None:
    scoring, dtype, (size, group, head_dim) = SCORINGS[number % 5], DTYPES[number % 3], SIZES[number * 5 % 6]
    options = {"group": group, "head_dim": head_dim, "dtype": dtype, "num_channels": max(1, head_dim // 3)}
    check_steps(Emulated, make_layer(seeded, scoring, [[size, size]], **options), seeded, steps=2)


@pytest.mark.parametrize(
    ("scoring", "dtype", "group", "head_dim"),
    [
        (Scoring.LOWBIT, torch.bfloat16, 4, 128),
        (Scoring.PAGES, torch.float32, 3, 80),
        (Scoring.DENSE, torch.float16, 2, 7),
    ],
)
def test_keys_and_values_in_8_bits(
    seeded: torch.Generator, scoring: Scoring, dtype: torch.dtype, group: int, head_dim: int
) -> None:
    options: dict[str, Any] = {"group": group, "head_dim": head_dim, "dtype": dtype, "num_channels": 5, "int8": True}
    check_steps(Emulated, make_layer(seeded, scoring, [[63, 63]], **options), seeded)
    ragged = [[150, 3, 20], [1, 300, 64]]
    check_steps(Emulated, make_layer(seeded, scoring, ragged, archived=True, top_k=100, **options), seeded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_in_8_bits_at_the_ends_of_their_range(seeded: torch.Generator, dtype: torch.dtype) -> None:
    check_8_bits_of_extremes(Emulated, dtype, seeded, steps=20)


@pytest.mark.parametrize("dense_below", [0, 60])
@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_ragged_rows_with_plans_of_their_own(
    seeded: torch.Generator, scoring: Scoring, archived: bool, dense_below: int
) -> None:
    lengths = [[150, 3, 20], [23, 24, 300], [1, 25, 64]]
    plans: dict[str, Any] = {"page_size": [1, 3, 4], "num_channels": [20, 1, 33], "top_k": [24, 50, 16]}
    pins: dict[str, Any] = {"sinks": 4, "recents": 5, "archived": archived, "dense_below": dense_below}
    check_steps(Emulated, make_layer(seeded, scoring, lengths, **plans, **pins), seeded)


@pytest.mark.parametrize(("has_sinks", "softcap"), [(True, None), (False, 1.5), (True, 0.7)])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_sinks_and_soft_caps(seeded: torch.Generator, scoring: Scoring, has_sinks: bool, softcap: float | None) -> None:
    terms = LogitTerms(3 * torch.randn(6, generator=seeded) if has_sinks else None, softcap)
    layer = make_layer(seeded, scoring, [[150, 3], [23, 130]], recents=3, terms=terms)
    check_steps(Emulated, layer, seeded, steps=2)


@pytest.mark.parametrize("scoring", SCORINGS[1:])
@pytest.mark.parametrize("page_size", [1, 3])
def test_ties_go_to_the_earlier_token(seeded: torch.Generator, scoring: Scoring, page_size: int) -> None:
    layer = make_layer(seeded, scoring, [[90, 400]], page_size=page_size, sinks=2, recents=2)
    layer.keys.fill_(1.0)
    alike = LowBitIndex(layer.keys, layer.lengths).buffers
    for stored, new in zip(layer.index, alike if layer.lowbit else map(torch.ones_like, layer.index), strict=True):
        stored.copy_(new)
    chosen, one = torch.empty_like(layer.positions), torch.ones(1, 2, 1, 64)
    Emulated.bind(layer)(torch.ones(1, 6, 1, 64), one, one, chosen)
    for head, length in enumerate((91, 401)):
        assert chosen[0, head, :24].tolist() == [*range(22), length - 2, length - 1]
    check_steps(Emulated, make_layer(seeded, scoring, [[90, 400]], page_size=page_size, tied=True), seeded)


def test_long_rows(seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    for scoring in SCORINGS:
        layer = make_layer(seeded, scoring, [[1087, 2110]], page_size=1, num_channels=9, top_k=300, recents=64)
        check_steps(Emulated, layer, seeded, steps=2)
        monkeypatch.setattr(cuda_step, "MOST_SCORES_IN_BLOCK", 1024)  # as of much longer rows


@pytest.mark.parametrize("most_cluster", [1, 4, 8])
def test_clusters_merge_their_pieces(
    seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch, most_cluster: int
) -> None:
    monkeypatch.setattr(Emulator, "num_cores", 12)
    monkeypatch.setattr(Emulator, "most_cluster", most_cluster)
    layer = make_layer(seeded, Scoring.DENSE, [[700, 90]])  # several clusters, and some blocks of one
    assert Emulated.bind(layer).launches[-1].shape.cluster == most_cluster
    check_steps(Emulated, layer, seeded, steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_low_bit_keys_fill_up_and_close(seeded: torch.Generator, dtype: torch.dtype) -> None:
    layer = make_layer(seeded, Scoring.LOWBIT, [[62, 127], [1021, 1023]], dtype=dtype, num_channels=17)
    check_steps(Emulated, layer, seeded, steps=4)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layer(data: st.DataObject) -> None:
    def draw(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    generator = torch.Generator().manual_seed(draw(0, 1 << 30))
    top_k, batch, heads = draw(1, 60), draw(1, 3), draw(1, 3)
    sinks = draw(0, top_k)
    layer = make_layer(
        generator,
        data.draw(st.sampled_from(SCORINGS)),
        [[draw(1, 200) for _ in range(heads)] for _ in range(batch)],
        page_size=[draw(1, 9) for _ in range(batch)],
        num_channels=draw(1, 64),
        top_k=top_k,
        dense_below=draw(0, 100),
        sinks=sinks,
        recents=draw(0, top_k - sinks),
        archived=data.draw(st.booleans()),
        tied=data.draw(st.booleans()),
        weighted=data.draw(st.booleans()),
    )
    check_steps(Emulated, layer, generator, steps=2)


@pytest.mark.parametrize("value", [torch.nan, -torch.tensor(torch.nan), torch.inf])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_what_is_no_number_shows_in_the_output(seeded: torch.Generator, scoring: Scoring, value: float) -> None:
    layer = make_layer(seeded, scoring, [[200, 90], [10, 60]], sinks=2, recents=2)
    query, one = torch.randn(2, 6, 1, 64, generator=seeded), torch.ones(2, 2, 1, 64)
    chosen = torch.full_like(layer.positions, -2)
    query[0, 0, 0, 5] = value
    output, _ = Emulated.bind(layer)(query, one, one, chosen)
    assert output[0, 0].isnan().any()
    assert output[0, 3:].isfinite().all()
    assert output[1].isfinite().all()
    if scoring != Scoring.DENSE:
        places = chosen[0, :, :24]
        assert ((places >= 0) & (places < 201)).all()
        assert (places.diff(dim=1) > 0).all()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_no_order_of_threads_and_blocks_changes_a_bit(scoring: Scoring) -> None:
    results = []
    for seed in (1, 1000):
        generator = torch.Generator().manual_seed(3)
        layer = make_layer(generator, scoring, [[700, 90]], tied=True)
        step = Emulated.bind(layer, seed)
        tokens = [torch.randn(1, heads, 1, 64, generator=generator) for heads in (6, 2, 2)]
        chosen = torch.empty_like(layer.positions)
        outputs = [step(*tokens, chosen)[0] for _ in range(2)]
        results.append([*outputs, chosen[0, 0, :24].clone()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scoring", [Scoring.DENSE, Scoring.PAGES, Scoring.LOWBIT])
def test_a_step_is_few_launches_and_leaves_its_scratch_ready(seeded: torch.Generator, scoring: Scoring) -> None:
    layer = make_layer(seeded, scoring, [[90, 3]])
    step = Emulated.bind(layer)
    query, key = torch.randn(1, 6, 1, 64, generator=seeded), torch.randn(1, 2, 1, 64, generator=seeded)
    step(query, key, key)
    assert len(step.launches) == (2 if scoring == Scoring.DENSE else 3)
    assert not step.scratch["pieces_done"].any()


@pytest.mark.parametrize("scoring", [Scoring.PAGES, Scoring.LOWBIT])
def test_unread_channels_are_not_read(seeded: torch.Generator, scoring: Scoring) -> None:
    layer = make_layer(seeded, scoring, [[90, 90]], num_channels=5)
    query = torch.randn(1, 6, 1, 64, generator=seeded)
    query[..., 5:] *= 1e-3
    if scoring == Scoring.PAGES:
        layer.index[0].view(1, 2, -1, 2, 64, 32)[:, :, :, :, 5:] = torch.nan  # minima, maxima
    else:
        layer.lowbit.ranges[:, :, :, 5:], layer.lowbit.open_keys[:, :, 5:] = torch.nan, torch.nan
    key = torch.randn(1, 2, 1, 64, generator=seeded)
    step = Emulated.bind(layer)
    step(query, key, key)
    units = 91 if scoring == Scoring.LOWBIT else 31
    assert step.scratch["logits"][..., :units].isfinite().all()
