"""Every backend's fused step against the reference operations, on random, ragged, tied and poisoned storage."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layers import DTYPES, SCORINGS, check_8_bits_of_extremes, check_steps, make_layer
from rocketkv import Budget, LayerCache, RocketKVConfig, UnsupportedError
from rocketkv.backends import Backend, Scoring, Spec, cpp, find_backend
from rocketkv.index import LowBitIndex, PageIndex
from rocketkv.selection import SELECTION_METHODS, SelectionMethod
from rocketkv.selection.hybrid import Hybrid

pytestmark = pytest.mark.usefixtures("two_threads")


SIZES = [(1, 1, 64), (63, 3, 80), (100, 4, 96), (257, 8, 128), (130, 5, 256), (70, 2, 20)]  # tokens, G, D


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("number", range(len(SIZES)))
def test_odd_sizes(backend: Backend, seeded: torch.Generator, number: int, scoring: Scoring) -> None:
    """Every size meets every scoring and every dtype, and every scoring meets every dtype."""
    (size, group, head_dim), dtype = SIZES[number], DTYPES[(number + SCORINGS.index(scoring)) % 3]
    num_channels = max(1, head_dim // 3)
    layer = make_layer(
        seeded, scoring, [[size, size]], group=group, head_dim=head_dim, dtype=dtype, num_channels=num_channels
    )
    check_steps(backend, layer, seeded)


@pytest.mark.parametrize("scoring", [Scoring.DENSE, Scoring.PAGES, Scoring.LOWBIT])
@pytest.mark.parametrize("number", [0, 1, 4, 5])
def test_keys_and_values_in_8_bits(backend: Backend, seeded: torch.Generator, number: int, scoring: Scoring) -> None:
    (size, group, head_dim), dtype = SIZES[number], DTYPES[(number + SCORINGS.index(scoring)) % 3]
    options = {
        "group": group,
        "head_dim": head_dim,
        "dtype": dtype,
        "num_channels": max(1, head_dim // 3),
        "int8": True,
    }
    check_steps(backend, make_layer(seeded, scoring, [[size, size]], **options), seeded)
    ragged = [[150, 3, 20], [1, 1200, 64]]
    check_steps(backend, make_layer(seeded, scoring, ragged, sinks=2, recents=3, **options), seeded)
    check_steps(backend, make_layer(seeded, scoring, ragged, archived=True, top_k=300, **options), seeded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_in_8_bits_at_the_ends_of_their_range(
    backend: Backend, seeded: torch.Generator, dtype: torch.dtype
) -> None:
    check_8_bits_of_extremes(backend, dtype, seeded, steps=40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", [Scoring.PAGES, Scoring.BOUNDS, Scoring.LOWBIT])
def test_an_odd_number_of_index_rows(
    backend: Backend, seeded: torch.Generator, scoring: str, dtype: torch.dtype
) -> None:
    layer = make_layer(
        seeded, scoring, [[90, 90]], group=5, head_dim=7, dtype=dtype, page_size=1, num_channels=3, top_k=20
    )
    check_steps(backend, layer, seeded)


@pytest.mark.parametrize("dense_below", [0, 60])
@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_ragged_rows_with_plans_of_their_own(
    backend: Backend, seeded: torch.Generator, scoring: str, archived: bool, dense_below: int
) -> None:
    lengths = [[150, 3, 20], [23, 24, 700], [1, 25, 64]]
    layer = make_layer(
        seeded,
        scoring,
        lengths,
        group=4,
        page_size=[1, 3, 4],
        num_channels=[20, 1, 33],
        top_k=[24, 50, 16],
        dense_below=dense_below,
        sinks=4,
        recents=5,
        archived=archived,
    )
    check_steps(backend, layer, seeded, steps=5)


@pytest.mark.parametrize("scoring", [Scoring.PAGES, Scoring.BOUNDS, Scoring.EXACT, Scoring.LOWBIT])
@pytest.mark.parametrize("page_size", [1, 3])
def test_ties_go_to_the_earlier_token(backend: Backend, seeded: torch.Generator, scoring: str, page_size: int) -> None:
    layer = make_layer(seeded, scoring, [[90, 400]], page_size=page_size, sinks=2, recents=2, tied=True)
    layer.keys.fill_(1.0)
    if scoring == Scoring.LOWBIT:
        for stored, new in zip(layer.index, LowBitIndex(layer.keys, layer.lengths).buffers, strict=True):
            stored.copy_(new)
    elif layer.index:
        layer.index[0].fill_(1.0)
    step = backend.bind(layer)
    assert step is not None
    chosen = torch.empty_like(layer.positions)
    one = torch.ones(1, 2, 1, 64)
    step(torch.ones(1, 6, 1, 64), one, one, chosen)
    for head, length in enumerate((91, 401)):
        assert chosen[0, head, :24].tolist() == [*range(22), length - 2, length - 1]
    check_steps(backend, make_layer(seeded, scoring, [[90, 400]], page_size=page_size, tied=True), seeded)


@pytest.mark.parametrize("heads", [1, 3])
def test_long_rows_are_shared_out(backend: Backend, seeded: torch.Generator, heads: int) -> None:
    check_steps(backend, make_layer(seeded, Scoring.DENSE, [[5000] * heads], head_dim=32), seeded)
    for scoring, size in (
        (Scoring.PAGES, 5000),
        (Scoring.EXACT, 5000),
        (Scoring.LOWBIT, 5055),
        (Scoring.LOWBIT, 5118),
    ):  # a group, a block fills
        layer = make_layer(seeded, scoring, [[size] * heads], head_dim=32, num_channels=9, top_k=700, recents=64)
        check_steps(backend, layer, seeded)


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize(
    ("selection", "kv_dtype"),
    [(name, "auto") for name in SELECTION_METHODS if name != "dense"] + [("lowbit", "int8"), ("hybrid", "int8")],
)
def test_a_cache_that_grows_decodes_as_by_the_reference(
    seeded: torch.Generator, selection: str, kv_dtype: str, mode: str
) -> None:
    x = torch.randn(3, 1, 6, 1045, 32, generator=seeded)
    query, key, value = x[0], x[1, :, :2], x[2, :, :2]
    budget = Budget(1020, 4, 9, 50)  # pages of 4, where there are any; 1024 tokens are a block of low-bit keys
    options = {"token_budget": 64, "selection": selection, "budget": budget, "mode": mode, "kv_dtype": kv_dtype}
    caches = [LayerCache(RocketKVConfig(backend=backend, **options)) for backend in ("cpp", "reference")]
    for cache in caches:
        cache.prefill(query[:, :, :1020], key[:, :, :1020], value[:, :, :1020])
    for i in range(1020, 1045):
        outputs = [cache.decode(*(x[:, :, i : i + 1] for x in (query, key, value))) for cache in caches]
        torch.testing.assert_close(*outputs)
        assert caches[0].read_bytes == caches[1].read_bytes


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layer(backend: Backend, data: st.DataObject) -> None:
    def draw(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    generator = torch.Generator().manual_seed(draw(0, 1 << 30))
    top_k, head_dim, batch = draw(1, 60), draw(1, 70), draw(1, 3)
    heads = draw(1, 3)
    sinks = draw(0, top_k)
    is_int8 = data.draw(st.booleans())
    layer = make_layer(
        generator,
        data.draw(st.sampled_from([name for name in SCORINGS if not is_int8 or name != "exact"])),
        [[draw(1, 200) for _ in range(heads)] for _ in range(batch)],
        group=draw(1, 9),
        head_dim=head_dim,
        dtype=data.draw(st.sampled_from(DTYPES)),
        page_size=[draw(1, 9) for _ in range(batch)],
        num_channels=draw(1, head_dim),
        top_k=top_k,
        dense_below=draw(0, 100),
        sinks=sinks,
        recents=draw(0, top_k - sinks),
        archived=data.draw(st.booleans()),
        tied=data.draw(st.booleans()),
        int8=is_int8,
    )
    check_steps(backend, layer, generator, steps=2)


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_a_row_shorter_than_the_pieces_beside_a_long_one(
    backend: Backend, seeded: torch.Generator, archived: bool, int8: bool
) -> None:
    layer = make_layer(seeded, Scoring.DENSE, [[1, 5000]], head_dim=32, archived=archived, int8=int8)
    check_steps(backend, layer, seeded)


def test_an_output_that_the_reference_rounds_hardly(backend: Backend) -> None:
    """The reference errs so little here, by chance, that weights rounded to bfloat16 would show beside it."""
    generator = torch.Generator().manual_seed(1160033)
    sizes = {"group": 3, "head_dim": 7, "page_size": 1, "num_channels": 1, "top_k": 1, "dtype": torch.bfloat16}
    check_steps(backend, make_layer(generator, Scoring.DENSE, [[181, 2, 2]], **sizes), generator, steps=2)


def test_infinite_logits_of_large_keys_stay_finite_where_the_reference_does(
    backend: Backend, seeded: torch.Generator
) -> None:
    layer = make_layer(seeded, Scoring.PAGES, [[200, 200]])
    layer.keys.mul_(1e4)
    layer.index[0].copy_(PageIndex(layer.keys[:, :, :200], layer.lengths, layer.pages.page_size).bounds)
    check_steps(backend, layer, seeded)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_shows_in_the_output(
    backend: Backend, seeded: torch.Generator, scoring: str, value: float
) -> None:
    layer = make_layer(seeded, scoring, [[200, 90], [10, 60]], sinks=2, recents=2)
    step = backend.bind(layer)
    assert step is not None
    query = torch.randn(2, 6, 1, 64, generator=seeded)
    query[0, 0, 0, 5] = value
    one = torch.ones(2, 2, 1, 64)
    output, _ = step(query, one, one)
    assert output[0, 0].isnan().any()  # as plain softmax has it: infinity minus infinity
    assert output[1].isfinite().all()


def test_a_backend_declines_with_a_reason() -> None:
    assert "head_dim=257" in str(cpp.decline(Spec("cpu", torch.float32, 257)))
    assert "float64" in str(cpp.decline(Spec("cpu", torch.float64, 64)))
    assert "meta" in str(cpp.decline(Spec("meta", torch.float32, 64)))
    backend, reasons = find_backend("auto", Spec("cpu", torch.float32, 257), Scoring.PAGES)
    assert backend is None
    assert any(reason.startswith("cpp: ") for reason in reasons)
    assert find_backend("reference", Spec("cpu", torch.float32, 64), Scoring.PAGES) == (None, [])


def test_an_unknown_scoring_is_declined(backend: Backend) -> None:
    for scoring in (None, "magic"):
        found, reasons = find_backend(backend.NAME, Spec("cpu", torch.float32, 64), scoring)
        assert found is None
        assert f"scoring={scoring!r} is none of dense, exact" in reasons[0]


def test_every_method_of_ours_has_a_fused_form(backend: Backend) -> None:
    assert {getattr(method(), "scoring", None) for method in SELECTION_METHODS.values()} == {*SCORINGS}


def test_a_method_with_logits_of_its_own_is_not_taken_for_its_parent() -> None:
    class Mine(Hybrid):
        def logits(self, *args: object, **kwargs: object) -> None:
            return None

    class Renamed(Hybrid):
        """The same backend under another name."""

    assert Mine.scoring is None
    assert Renamed.scoring == Scoring.PAGES
    assert SelectionMethod.scoring is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_query_that_is_no_number_gives_no_number(
    backend: Backend, seeded: torch.Generator, scoring: str, dtype: torch.dtype
) -> None:
    for value in (torch.nan, -torch.tensor(torch.nan)):
        layer = make_layer(seeded, scoring, [[90, 90]], dtype=dtype)
        query, key, chosen = (
            torch.randn(1, 6, 1, 64),
            torch.randn(1, 2, 1, 64).to(dtype),
            torch.full_like(layer.positions, -2),
        )
        query[0, 1] = value
        output, _ = backend.bind(layer)(query.to(dtype), key, key, chosen)
        assert output[0, 1].isnan().all()
        assert output[0, 3:].isfinite().all()
        if scoring != Scoring.DENSE:
            places = chosen[0, :, : int(layer.top_k[0])]
            assert ((places >= 0) & (places < 91)).all()
            assert (places.diff(dim=1) > 0).all()


def test_a_backend_asked_for_by_name_does_not_leave_it_to_the_reference(seeded: torch.Generator) -> None:
    tokens = torch.randn(3, 1, 1, 40, 64, dtype=torch.float64, generator=seeded)
    cache = LayerCache(RocketKVConfig(token_budget=64, backend="cpp"))
    cache.prefill(*tokens[..., :39, :])
    with pytest.raises(UnsupportedError, match=r"backend='cpp' declines this cache \(cpp: .*float64.*\); set"):
        cache.decode(*tokens[..., 39:, :])
