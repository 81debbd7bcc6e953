from hypothesis import given
from hypothesis import strategies as st

from rocketkv.stats import CacheStats, LayerStats

numbers = st.integers(0, 1 << 40)
layers = st.builds(LayerStats, *[st.integers(0, 1 << 20).map(float)] * 2, *[numbers] * 4)


@given(st.lists(layers, max_size=6))
def test_the_total_sums_bytes_and_averages_tokens(parts: list[LayerStats]) -> None:
    total = CacheStats(parts).total
    for name in ("kv_bytes", "read_bytes", "full_kv_bytes", "full_read_bytes"):
        assert getattr(total, name) == sum(getattr(part, name) for part in parts)
    for name in ("num_seen", "num_stored"):
        values = [getattr(part, name) for part in parts] or [0.0]
        assert min(values) <= getattr(total, name) <= max(values)


@given(layers)
def test_one_layer_alone_is_its_own_total(layer: LayerStats) -> None:
    assert CacheStats([layer]).total == layer


@given(numbers, st.integers(1, 1000), st.integers(1, 1000))
def test_the_two_ratios_point_in_opposite_directions(least: int, kept: int, read: int) -> None:
    """Stored bytes fall as a fraction of the full cache's; read bytes count how many times fewer they are."""
    full = LayerStats(1.0, 1.0, least + 1, least + 1, (least + 1) * kept, (least + 1) * read)
    assert abs(full.retained_fraction * kept - 1) < 1e-9
    assert abs(full.compression_factor / read - 1) < 1e-9


def test_a_cache_without_tokens_has_ratios_too() -> None:
    assert LayerStats().retained_fraction == 0.0
    assert LayerStats().compression_factor == 0.0
