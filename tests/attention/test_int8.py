"""Tests of keys and values in 8 bits: they decode like the dequantized numbers."""

import pytest
import torch

from caches import decode_all, strict
from inputs import Inputs, make_inputs
from rocketkv import Budget, ConfigError, InputError, LayerCache, ops
from rocketkv.selection import Exact, LowBit

pytestmark = pytest.mark.usefixtures("decoded_by")


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
@pytest.mark.parametrize("selection", ["lowbit", "hybrid", "quest", "sparq", "dense"])
def test_8_bits_decode_as_the_numbers_that_they_store(seeded: torch.Generator, selection: str, mode: str) -> None:
    x = make_inputs(seeded, 2, 4, 2, 340, 80)
    rounded = Inputs(x.query, *ops.dequantize_tokens(*ops.quantize_tokens(x.key, x.value), x.key.dtype))
    assert not torch.equal(x.key, rounded.key)
    options = {"token_budget": 48, "selection": selection, "mode": mode, "budget": Budget(250, 3, 9, 60)}
    stored, plain = LayerCache(strict(kv_dtype="int8", **options)), LayerCache(strict(**options))
    for cache, y in ((stored, x), (plain, rounded)):
        cache.load_tokens(*y.part(0, 300)[1:], num_seen=300)
    for start in (300, 320):
        outputs = [decode_all(cache, y, start, start + 15) for cache, y in ((stored, x), (plain, rounded))]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
        # A later turn attends to what is stored.
        later = (cache.prefill(*rounded.part(start + 15, start + 20)) for cache in (stored, plain))
        torch.testing.assert_close(*later, rtol=1e-5, atol=1e-6)
        assert torch.equal(stored.positions, plain.positions)


def test_8_bits_hold_and_read_what_they_say(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 2001, 64, torch.bfloat16)
    caches = {kv_dtype: LayerCache(strict(token_budget=128, kv_dtype=kv_dtype)) for kv_dtype in ("auto", "int8")}
    outputs = [cache.prefill(*x.part(0, 2000)) for cache in caches.values()]
    assert torch.equal(*outputs)  # a first prompt attends to its keys and values as they come
    for cache in caches.values():
        cache.decode(*x.part(2000, 2001))
    plain, int8 = caches.values()
    held = [int(cache.num_stored[0, 0]) for cache in (plain, int8)]
    assert [number - 1 for number in held] == [8 * 128, 12 * 128]  # one token was decoded
    split = LowBit.from_config(caches["int8"].config).split(held[1] - 1, 128, 64)
    top_k = split.top_k * 256 // (2 * (64 + 2))  # a token takes 256 bytes in bfloat16
    assert int8.plan.splits[0] == split._replace(top_k=top_k)
    scored = split.num_channels * (held[1] // 64 * 36 + held[1] % 64 * 2) + 4 * 64
    assert int8.read_bytes == 2 * (scored + top_k * 132) <= 2 * 128 * 256
    codes, exponents = (int8.working.tokens.fields[name] for name in ("keys", "exponents"))
    assert codes.dtype == torch.int8
    assert exponents.nbytes == codes.nbytes // 16
    assert int8.kv_bytes / held[1] < 0.65 * plain.kv_bytes / held[0]


def test_what_8_bits_cannot_do_is_refused(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 1, 4, 2, 400, 64)
    multi_turn = strict(token_budget=48, mode="multi_turn", kv_dtype="int8")
    cache = LayerCache(multi_turn, keep_queries=32)
    cache.prefill(*x.part(0, 380))
    with pytest.raises(InputError, match=r"has rounded its keys and values, .*; set kv_dtype='auto' in this cache"):
        cache.fork(strict(token_budget=48))
    alone = LayerCache(multi_turn)  # this cache begins with the stored numbers
    alone.prefill(x.query[:, :, :380], *ops.dequantize_tokens(*cache.working.archive.views().values(), x.key.dtype))
    assert torch.equal(decode_all(cache.fork(multi_turn), x, 380, 400), decode_all(alone, x, 380, 400))
    for selection in ("exact", Exact()):
        with pytest.raises(ConfigError, match="selection='exact' cannot read keys in 8 bits; set kv_dtype='auto'"):
            strict(token_budget=48, selection=selection, kv_dtype="int8")
    with pytest.raises(ConfigError, match="kv_dtype='int4' does not exist; did you mean int8"):
        strict(token_budget=48, kv_dtype="int4")
