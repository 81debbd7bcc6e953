"""Tests of the calls that `LayerCache` refuses in a sentence, and that a refused call changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from caches import SMALL, Call, assert_same, prefilled, strict, token
from inputs import Inputs, make_inputs
from rocketkv import Budget, ConfigError, InputError, LayerCache, RocketKVConfig, UnsupportedError
from rocketkv.ops import LogitTerms


def changed(**changes: Callable[[Tensor], Tensor]) -> Call:
    """Decode a token of which some tensors are changed."""
    return lambda cache, x: cache.decode(
        *token(x)._replace(**{k: change(getattr(token(x), k)) for k, change in changes.items()})
    )


def all_changed(change: Callable[[Tensor], Any]) -> Call:
    return lambda cache, x: cache.decode(*(change(a) for a in token(x)))


def rows(make: Callable[[], Any]) -> Call:
    return lambda cache, x: cache.select_rows(make())


def scaled(scale: Any) -> Call:
    return lambda cache, x: cache.decode(*token(x), scale=scale)


def with_terms(*terms: Any) -> Call:
    return lambda cache, x: cache.decode(*token(x), terms=LogitTerms(*terms))


def made_for_inference() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(2, 2, 300, dtype=torch.bool)


WRONG: list[tuple[Call, str]] = [
    (all_changed(lambda a: a[..., :8]), "the cache holds keys with head_dim 16; continue with those"),
    (all_changed(lambda a: torch.cat([a, a], -1)), "the cache holds keys with head_dim 16"),
    (all_changed(lambda a: a.to("meta")), "give all tensors on one device, and not on meta"),
    (changed(query=lambda a: a.to("meta")), "give all tensors on one device"),
    (changed(value=lambda a: a.to("meta")), "give all tensors on one device"),
    (all_changed(lambda a: a.half()), "key is torch.float16, but the cache holds torch.float32"),
    (all_changed(lambda a: a.to(torch.float8_e4m3fn)), "give one dtype for all, of float32"),
    (all_changed(lambda a: a.long()), "give one dtype for all"),
    (all_changed(lambda a: a.to_sparse()), "are not all dense; give strided tensors"),
    (all_changed(lambda a: a.numpy()), "query is a ndarray; give a torch.Tensor"),
    (all_changed(lambda a: None), "query is a NoneType; give a torch.Tensor"),
    (all_changed(lambda a: a[0]), "do not fit; give"),
    (all_changed(lambda a: a[:1]), "the cache holds batch 2"),
    (all_changed(lambda a: a[:, :0]), "no dimension of size 0"),
    (all_changed(lambda a: a.expand(-1, -1, 2, -1)), "decode takes one token per row"),
    (scaled(0), "scale=0 is no positive, finite number"),
    (scaled(-1.0), "scale=-1.0 is no positive"),
    (scaled(float("nan")), "scale=nan is no positive"),
    (scaled(float("inf")), "scale=inf is no positive"),
    (scaled(1e-60), "scale=1e-60 is no positive"),
    (scaled(True), "scale=True is no positive"),
    (scaled(torch.ones(2)), "is no positive"),
    (scaled("1"), "scale='1' is no positive"),
    (with_terms(None, 0), "softcap=0 is no positive, finite number"),
    (with_terms(None, float("nan")), "softcap=nan is no positive"),
    (with_terms(None, "50"), "softcap='50' is no positive"),
    (with_terms(None, True), "softcap=True is no positive"),
    (with_terms(torch.zeros(3)), r"sink_logits=torch.float32 \[3\] do not fit 4 query heads; give \[Hq\] floats"),
    (with_terms(torch.zeros(4, dtype=torch.int64)), "sink_logits=torch.int64"),
    (with_terms([0.0] * 4), "sink_logits=.* do not fit 4 query heads"),
    (with_terms(torch.zeros(4, device="meta")), "sink_logits are on meta, but the query is on cpu"),
    (lambda c, x: c.prefill(*x.part(203, 210), terms=50.0), r"terms=50.0 is no LogitTerms"),
    (lambda c, x: c.prefill(*token(x), scale=float("nan")), "scale=nan is no positive"),
    (lambda c, x: c.prefill(*(a[..., :8] for a in token(x))), "the cache holds keys with head_dim 16"),
    (lambda c, x: c.prefill(*(a.to("meta") for a in token(x))), "give all tensors on one device"),
    (lambda c, x: c.prefill(*x.part(203, 210), padding=torch.tensor([0.5, 0])), "padding=.* does not fit"),
    (lambda c, x: c.prefill(*x.part(203, 210), padding=torch.tensor([True, False])), "padding=.* does not fit"),
    (lambda c, x: c.prefill(*x.part(203, 210), padding=torch.tensor([7, 0])), "padding=.7, 0. does not fit"),
    (lambda c, x: c.prefill(*x.part(203, 210), padding="left"), "padding=left does not fit"),
    (lambda c, x: c.prefill(*x.part(203, 210), padding=torch.ones(2).int().to("meta")), "padding=.* does not fit"),
    (rows(lambda: torch.tensor([], dtype=torch.int64)), "are no row numbers; give a tensor like"),
    (rows(lambda: [0]), r"rows=\[0\] are no row numbers"),
    (rows(lambda: torch.tensor([True, False])), "are no row numbers"),
    (rows(lambda: torch.tensor([0.0])), "are no row numbers"),
    (rows(lambda: torch.tensor([[0]])), "are no row numbers"),
    (rows(lambda: torch.zeros(1, dtype=torch.int64, device="meta")), "are no row numbers"),
    (rows(lambda: torch.tensor([-1])), r"rows=\[-1\] are not all in the batch; give numbers from 0 to 1"),
    (rows(lambda: torch.tensor([0, 2])), "are not all in the batch"),
    (
        lambda c, x: c.load_tokens(*x.part(0, 9)[1:], num_seen=9),
        "has tokens already; load the new ones into an empty cache",
    ),
    (lambda c, x: c.fork(None), "None is no RocketKVConfig"),
]


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_wrong_call_is_refused_in_a_sentence_and_changes_nothing(x: Inputs, backend: str, mode: str) -> None:
    cache = prefilled(x, backend=backend, mode=mode)
    untouched = cache.copy()
    for call, message in WRONG:
        for is_enabled in (False, True):  # without gradients a step of a kind that passed before is not checked again
            with torch.set_grad_enabled(is_enabled), pytest.raises((InputError, ConfigError), match=message):
                call(cache, x)
    assert_same(cache, untouched, x)


@torch.no_grad()
def test_a_kind_of_tensors_that_once_passed_is_checked_anew_after_the_batch_has_changed(x: Inputs) -> None:
    cache = prefilled(x)
    cache.select_rows(torch.tensor([1]))
    with pytest.raises(InputError, match="the cache holds batch 1"):
        cache.decode(*token(x))
    cache.reset()
    with pytest.raises(InputError, match="nothing was prefilled"):
        cache.decode(*token(x))
    cache.prefill(*(a[:1] for a in x.part(0, 200)))
    with pytest.raises(InputError, match="the cache holds batch 1"):
        cache.decode(*token(x))


def bad(change: Callable[[Inputs], Inputs]) -> Callable[[LayerCache, Inputs], Any]:
    return lambda cache, x: cache.prefill(*change(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(lambda x: x._replace(key=x.key[:, :, 1:])), "do not fit; give"),
        (bad(lambda x: x._replace(value=x.value[..., 1:])), "key and value differ"),
        (bad(lambda x: x._replace(query=x.query[:, :3])), "give Hq as a multiple of Hkv"),
        (bad(lambda x: x._replace(value=x.value.half())), "give one dtype for all"),
        (bad(lambda x: Inputs(*(a[:, :, :0] for a in x))), "no dimension of size 0"),
        (lambda c, x: c.prefill(*x, padding=torch.tensor([50])), r"padding=\[50\] does not fit; .* from 0 to 49"),
        (lambda c, x: c.prefill(*x, padding=torch.tensor([1, 1])), "one number per row, 1 in all"),
        (
            lambda c, x: c.decode(*x.part(0, 1)),
            "nothing was prefilled since this cache was made or forked; call prefill",
        ),
        (lambda c, x: (c.prefill(*x), c.decode(*x)), "decode takes one token per row, not 50"),
        (lambda c, x: (c.prefill(*x), c.prefill(*(a.repeat(2, 1, 1, 1) for a in x))), "the cache holds batch 1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    seeded: torch.Generator, call: Callable[[LayerCache, Inputs], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(LayerCache(strict(token_budget=48)), make_inputs(seeded, 1, 4, 2, 50, 64))


@pytest.mark.usefixtures("decoded_by")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_another_dtype_than_the_cache_holds_is_refused(seeded: torch.Generator, kv_dtype: str) -> None:
    x = make_inputs(seeded, 1, 4, 2, 300, 64)
    cache = LayerCache(strict(token_budget=48, mode="multi_turn", kv_dtype=kv_dtype))
    cache.prefill(*x.part(0, 290))
    cache.decode(*x.part(290, 291))
    other = Inputs(*(a.bfloat16() for a in x.part(291, 292)))
    for take_in in (cache.decode, cache.prefill):
        with pytest.raises(
            InputError, match=r"key is torch\.bfloat16, but the cache holds torch\.float32; continue in"
        ):
            take_in(*other)


def test_gradients_are_refused(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 50, 64)
    with pytest.raises(UnsupportedError, match="has no gradients"):
        LayerCache(strict(token_budget=48)).prefill(x.query.requires_grad_(), x.key, x.value)


def test_gradients_are_refused_wherever_tensors_come_in(x: Inputs) -> None:
    cache = prefilled(x)
    with pytest.raises(UnsupportedError, match="has no gradients"):
        cache.decode(token(x).query.clone().requires_grad_(), *token(x)[1:])
    keys = x.part(0, 200).key.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="has no gradients"):
        LayerCache(RocketKVConfig(**SMALL)).load_tokens(keys, keys, num_seen=200)


@pytest.mark.usefixtures("decoded_by")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": Budget(50, 2, 65, 20)}, "budget.num_channels=65 is more than head_dim=64"),
        ({"sink_tokens": 28}, "31 tokens are pinned, but a step attends to top_k=30 only"),
    ],
)
def test_options_that_do_not_fit_the_layer_are_refused(
    seeded: torch.Generator, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerCache(strict(token_budget=40, **options)).prefill(*make_inputs(seeded))


def test_pins_that_will_not_fit_once_a_short_row_has_grown_are_refused_at_once(seeded: torch.Generator) -> None:
    """30 + 30 pins fit in the 64 tokens that are all attended now, not in the 48 that are chosen of more."""
    prompt = make_inputs(seeded, num_tokens=40)
    with pytest.raises(ConfigError, match="60 tokens are pinned, but a step attends to top_k=48 only"):
        LayerCache(strict(token_budget=64, window_size=8, sink_tokens=30, recent_tokens=30)).prefill(*prompt)
    LayerCache(strict(token_budget=64, window_size=8, sink_tokens=24, recent_tokens=24)).prefill(*prompt)
