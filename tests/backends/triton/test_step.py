"""The kernels of a decode step against the reference operations, and what the backend declines."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from inputs import make_inputs
from layers import DTYPES, check_8_bits_of_extremes, check_steps, make_layer
from rocketkv import Budget, LayerCache, RocketKVConfig, backends, ops, ragged
from rocketkv.backends import Scoring, Spec, cpp, find_backend, triton
from rocketkv.backends.triton.launch import Launch
from rocketkv.index import LowBitIndex
from scales import check, exact_inputs, scaled

if (reason := triton.decline(Spec("cpu", torch.float32, 64))) is not None:
    pytest.skip(f"{reason}; `make test-triton` runs these in the interpreter", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # masked lanes compute, too

SELECTING = [scoring for scoring in triton.SCORINGS if scoring != Scoring.DENSE]


@pytest.mark.parametrize("scoring", triton.SCORINGS)
@pytest.mark.parametrize(
    ("size", "group", "head_dim", "dtype"),
    [
        (1, 1, 64, torch.bfloat16),
        (63, 3, 80, torch.float32),
        (100, 4, 96, torch.float16),
        (257, 8, 128, torch.bfloat16),
        (130, 5, 256, torch.float32),
        (70, 17, 20, torch.float16),
    ],
)
def test_odd_sizes(
    seeded: torch.Generator, scoring: str, size: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    layer = make_layer(
        seeded, scoring, [[size, size]], group=group, head_dim=head_dim, dtype=dtype, num_channels=head_dim // 3
    )
    check_steps(triton, layer, seeded, steps=1)


@pytest.mark.parametrize("scoring", [Scoring.DENSE, Scoring.PAGES, Scoring.LOWBIT])
@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"),
    [(4, 96, torch.float16), (8, 128, torch.bfloat16), (5, 80, torch.float16), (17, 7, torch.bfloat16)],
)
def test_keys_and_values_in_8_bits(
    seeded: torch.Generator, scoring: str, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    options = {
        "group": group,
        "head_dim": head_dim,
        "dtype": dtype,
        "num_channels": max(1, head_dim // 3),
        "int8": True,
    }
    archived = dtype == torch.bfloat16
    check_steps(
        triton, make_layer(seeded, scoring, [[150, 63], [1, 20]], archived=archived, **options), seeded, steps=2
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_in_8_bits_at_the_ends_of_their_range(seeded: torch.Generator, dtype: torch.dtype) -> None:
    check_8_bits_of_extremes(triton, dtype, seeded, steps=10)


@pytest.mark.parametrize("scoring", [Scoring.PAGES, Scoring.BOUNDS])
def test_pages_of_one_token_stored_once(seeded: torch.Generator, scoring: str) -> None:
    layer = make_layer(seeded, scoring, [[90, 90]], group=5, head_dim=7, page_size=1, num_channels=3, top_k=20)
    check_steps(triton, layer, seeded, steps=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", triton.SCORINGS)
def test_ragged_rows_with_plans_of_their_own(seeded: torch.Generator, scoring: str, dtype: torch.dtype) -> None:
    layer = make_layer(
        seeded,
        scoring,
        [[150, 3, 20], [23, 24, 300], [1, 25, 64]],
        group=4,
        dtype=dtype,
        page_size=[1, 3, 4],
        num_channels=[20, 1, 33],
        top_k=[24, 50, 16],
        dense_below=60 if dtype == torch.bfloat16 else 0,
        sinks=4,
        recents=5,
        archived=dtype != torch.float32,
    )
    check_steps(triton, layer, seeded, steps=2)


@pytest.mark.parametrize("scoring", SELECTING)
@pytest.mark.parametrize("page_size", [1, 3])
def test_ties_go_to_the_earlier_token(seeded: torch.Generator, scoring: str, page_size: int) -> None:
    layer = make_layer(seeded, scoring, [[90, 200]], page_size=page_size, sinks=2, recents=2)
    layer.keys.fill_(1.0)
    alike = (
        LowBitIndex(layer.keys, layer.lengths).buffers
        if scoring == Scoring.LOWBIT
        else map(torch.ones_like, layer.index)
    )
    for stored, new in zip(layer.index, alike, strict=True):
        stored.copy_(new)
    chosen = torch.empty_like(layer.positions)
    one = torch.ones(1, 2, 1, 64)
    triton.bind(layer)(torch.ones(1, 6, 1, 64), one, one, chosen)
    for head, length in enumerate((91, 201)):
        assert chosen[0, head, :24].tolist() == [*range(22), length - 2, length - 1]
    check_steps(triton, make_layer(seeded, scoring, [[90, 200]], page_size=page_size, tied=True), seeded, steps=2)


@pytest.mark.parametrize("value", [torch.nan, -torch.tensor(torch.nan), torch.inf])
@pytest.mark.parametrize("scoring", triton.SCORINGS)
def test_what_is_no_number_shows_in_the_output(seeded: torch.Generator, scoring: str, value: float) -> None:
    layer = make_layer(seeded, scoring, [[200, 90], [10, 60]], sinks=2, recents=2)
    query, one, chosen = (
        torch.randn(2, 6, 1, 64, generator=seeded),
        torch.ones(2, 2, 1, 64),
        torch.full_like(layer.positions, -2),
    )
    query[0, 0, 0, 5] = value
    output, _ = triton.bind(layer)(query, one, one, chosen)
    assert output[0, 0].isnan().any()
    assert output[0, 3:].isfinite().all()
    assert output[1].isfinite().all()
    if scoring != Scoring.DENSE:
        places = chosen[0, :, :24]
        assert ((places >= 0) & (places < 201)).all()
        assert (places.diff(dim=1) > 0).all()


@pytest.mark.parametrize("scoring", [Scoring.DENSE, Scoring.PAGES, Scoring.LOWBIT])
def test_a_step_is_few_launches_and_leaves_its_scratch_ready(
    seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch, scoring: str
) -> None:
    started: list[Any] = []
    plain = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, **token: (started.append(self), plain(self, **token)))
    layer = make_layer(seeded, scoring, [[90, 3]])
    step = triton.bind(layer)
    query, key = torch.randn(1, 6, 1, 64, generator=seeded), torch.randn(1, 2, 1, 64, generator=seeded)
    step(query, key, key)
    assert started == step.launches
    assert len(started) == (2 if scoring == Scoring.DENSE else 3)
    assert not step.launches[-1].arguments["pieces_done"].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_low_bit_keys_fill_up_and_close(seeded: torch.Generator, dtype: torch.dtype) -> None:
    sizes = {"group": 4, "head_dim": 48, "dtype": dtype, "num_channels": 17}
    check_steps(triton, make_layer(seeded, Scoring.LOWBIT, [[62, 127], [1022, 1023]], **sizes), seeded, steps=2)


@pytest.mark.parametrize(
    "values", [(3.0, 3.0), (torch.nan, 1.0), (torch.inf, 1.0), (-torch.inf, torch.inf), (6e4, -6e4)]
)
def test_a_group_of_extremes_is_quantized_as_by_the_reference(
    seeded: torch.Generator, values: tuple[float, float]
) -> None:
    layer = make_layer(seeded, Scoring.LOWBIT, [[63, 127]], dtype=torch.float16)
    layer.index[2][..., :63] = torch.tensor(values)[torch.randint(2, (1, 2, 64, 63), generator=seeded)]
    expected = ops.LowBitKeys(*(buffer.clone() for buffer in layer.index))
    key = torch.randn(1, 2, 1, 64, generator=seeded).half()
    ops.append_lowbit(expected, key, layer.lengths.clone())
    triton.bind(layer)(torch.ones(1, 6, 1, 64).half(), key, key)
    for mine, reference in zip(layer.index, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0, equal_nan=True)


def test_a_backend_takes_the_place_of_an_operation_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros(1, 1, 1, 64)
    monkeypatch.setattr(triton, "DEVICES", ("cpu",))
    monkeypatch.setattr(cpp, "DEVICES", ())
    for operation in ("score_window", "build_lowbit", "build_pages"):
        assert backends.fastest(operation, tokens) is getattr(triton, operation)
    assert backends.fastest("build_lowbit", tokens.double()) is ops.build_lowbit
    assert backends.fastest("score_tokens", tokens) is ops.score_tokens


@pytest.mark.parametrize("scoring", [Scoring.PAGES, Scoring.LOWBIT])
def test_unread_channels_are_not_read(seeded: torch.Generator, scoring: str) -> None:
    layer = make_layer(seeded, scoring, [[90, 90]], num_channels=5)
    query = torch.randn(1, 6, 1, 64, generator=seeded)
    query[..., 5:] *= 1e-3
    if scoring == Scoring.PAGES:
        layer.index[0].view(1, 2, -1, 2, 64, 32)[:, :, :, :, 5:] = torch.nan  # minima, maxima
    else:
        _, ranges, open_keys, _ = layer.index
        ranges[:, :, :, 5:], open_keys[:, :, 5:] = torch.nan, torch.nan
    key = torch.randn(1, 2, 1, 64, generator=seeded)
    step = triton.bind(layer)
    step(query, key, key)
    assert step.launches[0].arguments["logits"].isfinite().all()


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize("selection", ["hybrid", "hybrid_paper", "quest", "sparq", "exact", "lowbit"])
def test_a_cache_that_grows_decodes_as_by_the_reference(
    seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch, selection: str, mode: str
) -> None:
    monkeypatch.setattr(ragged, "GROWTH", 4)
    inputs = make_inputs(seeded, num_tokens=140, head_dim=32)
    config = RocketKVConfig(token_budget=64, selection=selection, budget=Budget(120, 4, 9, 50), mode=mode)
    caches = [LayerCache(replace(config, backend=backend)) for backend in ("triton", "reference")]
    for one in caches:
        one.prefill(*inputs.part(0, 130))
    for i in range(130, 140):
        outputs = [one.decode(*inputs.part(i, i + 1)) for one in caches]
        torch.testing.assert_close(*outputs)
        assert caches[0].read_bytes == caches[1].read_bytes
    copied = caches[0].copy()
    read_bytes = copied.read_bytes
    caches[0].decode(*inputs.part(0, 1))
    assert copied.read_bytes == read_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selection", ["lowbit", "hybrid"])
def test_scaling_keys_and_queries_changes_no_bit(seeded: torch.Generator, selection: str, dtype: torch.dtype) -> None:
    x = exact_inputs(seeded, 32, dtype, batch=1)
    options = {"token_budget": 24, "window_size": 8, "eviction": "keep_all", "selection": selection}
    check(x, scaled(x, seeded), turns=[(60, 6), (24, 6)], backend="triton", **options)  # groups and blocks fill


def test_a_dense_cache_has_a_step_too(seeded: torch.Generator) -> None:
    inputs = make_inputs(seeded, num_tokens=45, head_dim=32)
    config = RocketKVConfig(token_budget=32, eviction="keep_all", selection="dense")
    caches = [LayerCache(replace(config, backend=backend)) for backend in ("triton", "reference")]
    for one in caches:
        one.prefill(*inputs.part(0, 43))
    for i in range(43, 45):
        torch.testing.assert_close(*(one.decode(*inputs.part(i, i + 1)) for one in caches))


def test_the_interpreter_is_used_only_when_asked_for() -> None:
    tokens = torch.zeros(1, 1, 1, 64)
    assert find_backend("triton", Spec.of(tokens), Scoring.PAGES)[0] is triton
    assert find_backend("auto", Spec.of(tokens), Scoring.PAGES)[0] is not triton


def test_it_declines_with_a_reason() -> None:
    assert "head_dim=257" in str(triton.decline(Spec("cpu", torch.float32, 257)))
    assert "float64" in str(triton.decline(Spec("cpu", torch.float64, 64)))
    assert triton.decline(Spec("cpu", torch.bfloat16, 64, "int8")) is None
    assert "16-bit dtypes only" in str(triton.decline(Spec("cpu", torch.float32, 64, "int8")))
    assert "not on meta" in str(triton.decline(Spec("meta", torch.float32, 64)))
    backend, reasons = find_backend("triton", Spec("cpu", torch.float32, 64), "magic")
    assert backend is None
    assert "scoring='magic' is none of dense, exact" in reasons[0]


def test_without_triton_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(triton, "import_module", fail)
    triton._load.cache_clear()
    assert "install rocketkv[triton]" in str(triton.decline(Spec("cpu", torch.float32, 64)))
