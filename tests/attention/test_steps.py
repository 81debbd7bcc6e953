"""Tests of one decode step: its dtype, scale, gradient mode, output memory and report."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from caches import ALL_METHODS, SMALL, decode_all, prefilled, strict, token
from inputs import Inputs, make_inputs
from rocketkv import InputError, LayerCache, RocketKVConfig
from rocketkv.backends import cpp


@pytest.mark.usefixtures("decoded_by")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_inference_mode_and_no_grad_may_alternate(seeded: torch.Generator, mode: str, kv_dtype: str) -> None:
    x = make_inputs(seeded, 2, 4, 2, 300, 64)
    config = strict(token_budget=48, mode=mode, kv_dtype=kv_dtype)
    mixed, plain = LayerCache(config), LayerCache(config)
    plain.prefill(*x.part(0, 200))
    with torch.inference_mode():
        mixed.prefill(*x.part(0, 200))
        mixed.decode(*x.part(200, 201))
        mixed.select_rows(torch.tensor([0, 1]))
    plain.decode(*x.part(200, 201))
    assert torch.equal(decode_all(mixed, x, 201, 240), decode_all(plain, x, 201, 240))
    assert torch.equal(mixed.prefill(*x.part(240, 290)), plain.prefill(*x.part(240, 290)))
    assert torch.equal(decode_all(mixed, x, 290, 300), decode_all(plain, x, 290, 300))


@pytest.mark.usefixtures("decoded_by")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_in_give_dtypes_out(seeded: torch.Generator, dtype: torch.dtype) -> None:
    x = make_inputs(seeded, 1, 4, 2, 300, 64, dtype)
    single = make_inputs(torch.Generator().manual_seed(0), 1, 4, 2, 300, 64)
    config = strict(token_budget=64, eviction="keep_all", selection="exact")
    cache, reference = LayerCache(config), LayerCache(config)
    assert cache.prefill(*x.part(0, 290)).dtype == dtype
    reference.prefill(*single.part(0, 290))
    output = decode_all(cache, x, 290, 300)
    assert output.dtype == dtype
    expected = decode_all(reference, single, 290, 300)
    assert cache.read_bytes * 4 == reference.read_bytes * x.key.element_size()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("decoded_by")
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_step_tells_what_it_attended_to(seeded: torch.Generator, mode: str) -> None:
    x = make_inputs(seeded, 2, 4, 2, 260, 64)
    for eviction, selection in ALL_METHODS:
        config = strict(token_budget=40, mode=mode, eviction=eviction, selection=selection)
        cache = LayerCache(config)
        cache.prefill(*x.part(0, 240), padding=torch.tensor([0, 60]))
        cache.trace = True
        for t in range(240, 260):
            output = cache.decode(*x.part(t, t + 1))
            attended = cache.last_attended
            assert attended is not None
            assert attended.shape == (2, 2, t + 1)
            for row, start in ((0, 0), (1, 60)):
                keys, values = (a[row, :, start : t + 1] for a in (x.key, x.value))
                assert not attended[row, :, t + 1 - start :].any()
                expected = scaled_dot_product_attention(
                    x.query[row, :, t : t + 1],
                    keys.repeat_interleave(2, 0),
                    values.repeat_interleave(2, 0),
                    attn_mask=attended[row, :, None, : t + 1 - start].repeat_interleave(2, 0),
                )
                torch.testing.assert_close(output[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("decoded_by")
def test_scale_replaces_the_default(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 300, 64)
    config = strict(token_budget=48)
    scaled, plain = LayerCache(config), LayerCache(config)
    doubled = Inputs(x.query * 2, x.key, x.value)
    torch.testing.assert_close(scaled.prefill(*x.part(0, 290), scale=0.25), plain.prefill(*doubled.part(0, 290)))
    for t in range(290, 300):
        torch.testing.assert_close(scaled.decode(*x.part(t, t + 1), scale=0.25), plain.decode(*doubled.part(t, t + 1)))


@pytest.mark.usefixtures("decoded_by")
def test_a_step_of_another_kind_is_checked_and_bound_anew(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 110, 64)
    cache, same = LayerCache(strict(token_budget=48)), LayerCache(strict(token_budget=48))
    for c in (cache, same):
        c.prefill(*x.part(0, 100))
    decode_all(cache, x, 100, 105)
    decode_all(same, x, 100, 105)
    with pytest.raises(InputError, match="differ"):
        cache.decode(x.query[:, :, 105:106].half(), *x.part(105, 106)[1:])
    with pytest.raises(InputError, match="key and value differ"):
        cache.decode(*x.part(105, 106)[:2], x.value[:, :1, 105:106])
    halved = cache.decode(*x.part(105, 106), scale=0.5 * 64**-0.5)
    assert torch.equal(halved, same.decode(0.5 * x.query[:, :, 105:106], *x.part(105, 106)[1:]))


@pytest.mark.parametrize(
    "change", [lambda: torch.set_default_device("meta"), lambda: torch.set_default_dtype(torch.float64)]
)
def test_outputs_lie_where_the_tensors_do_whatever_torch_makes_by_default(
    x: Inputs, backend: str, change: Callable[[], None]
) -> None:
    expected, cache = prefilled(x, backend=backend), LayerCache(RocketKVConfig(**SMALL, backend=backend))
    cpp._spare_outputs.cache_clear()
    try:
        change()
        cache.prefill(*x.part(0, 200))
        outputs = [cache.decode(*x.part(t, t + 1)) for t in range(200, 204)]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(outputs[-1], expected.decode(*token(x)))
