"""A cache and its conversation: what continues it, what does not, what a refusal costs, and the way back."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, Phi3Config, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from rocketkv import InputError, LayerCache, RocketKVCache, RocketKVConfig, UnsupportedError, disable, enable
from rocketkv.eviction import KeepAll
from rocketkv.stack import stack
from rocketkv.versions import CACHE_ARGUMENT, pass_cache
from test_hf import COMPRESSED, COMPRESSED_MT, EVERYTHING, generate
from tiny import CONFIGS, GROUPED, prompts, tiny_model

modes = pytest.mark.parametrize("config", [COMPRESSED, COMPRESSED_MT], ids=["single_turn", "multi_turn"])
names = pytest.mark.parametrize("name", ["llama", "gemma3"])
MORE = prompts(20, seed=7)[0]


def answered(
    model: PreTrainedModel, config: RocketKVConfig, ids: Tensor, **options: Any
) -> tuple[RocketKVCache, Tensor]:
    """A cache after one answer, and the text with it."""
    cache = RocketKVCache(model.config, config)
    return cache, generate(model, ids, **pass_cache(cache), **options)


def forward(model: PreTrainedModel, cache: RocketKVCache, ids: Tensor, **options: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, **pass_cache(cache), **options).logits


# What a refused call costs


WRONG: list[tuple[str, Callable[[PreTrainedModel, RocketKVCache, Tensor], object], str]] = [
    (
        "the same text",
        lambda m, c, ids: generate(m, ids[:, :200], **pass_cache(c)),
        "all 200 tokens .* taken in already",
    ),
    ("its beginning", lambda m, c, ids: generate(m, ids[:, :50], **pass_cache(c)), "all 50 tokens .* taken in already"),
    ("new ids only", lambda m, c, ids: generate(m, MORE, **pass_cache(c)), "text of 20 differs from them at token 0"),
    (
        "a changed answer",
        lambda m, c, ids: generate(m, torch.cat([ids[:, :205], MORE], 1), **pass_cache(c)),
        "taken in 211 tokens, and the text of 225 differs from them at token 205",
    ),
    (
        "another text, longer",
        lambda m, c, ids: generate(m, prompts(300, seed=5)[0], **pass_cache(c)),
        "differs from them at token 0",
    ),
    (
        "embeddings of it",
        lambda m, c, ids: generate(
            m, None, torch.ones(1, 90), inputs_embeds=m.get_input_embeddings()(ids[:, :90]), **pass_cache(c)
        ),
        "all 90 tokens",
    ),
    (
        "two rows",
        lambda m, c, ids: generate(m, ids.repeat(2, 1), **pass_cache(c)),
        "the cache holds 1 rows, but 2 came",
    ),
    ("two rows in a forward pass", lambda m, c, ids: forward(m, c, MORE.repeat(2, 1)), "holds 1 rows, but 2 came"),
    ("gradients", lambda m, c, ids: m(input_ids=MORE, **pass_cache(c)), "has no gradients"),
    ("no new tokens", lambda m, c, ids: forward(m, c, ids[:, :0]), "no new tokens came with this cache"),
    (
        "no cache to be used",
        lambda m, c, ids: generate(m, torch.cat([ids, MORE], 1), use_cache=False, **pass_cache(c)),
        "use_cache=False contradicts the RocketKVCache",
    ),
    (
        "no cache to be used in a forward pass",
        lambda m, c, ids: forward(m, c, MORE, use_cache=False),
        "use_cache=False",
    ),
    (
        "positions of a text taken in again",
        lambda m, c, ids: forward(m, c, ids[:, :200], position_ids=torch.arange(200)[None]),
        r"position_ids end at \[199\], but the cache has seen \[211\] tokens",
    ),
    (
        "a mask of other rows",
        lambda m, c, ids: forward(m, c, MORE, attention_mask=torch.ones(2, 231)),
        "has 2 rows for 1",
    ),
    (
        "another model",
        lambda m, c, ids: forward(enable(tiny_model("llama")), c, MORE),
        "the cache was made for|another",
    ),
]


@names
@modes
def test_a_refused_call_costs_nothing(name: str, config: RocketKVConfig) -> None:
    model = enable(tiny_model(name))
    first = prompts(200)[0]
    cache, ids = answered(model, config, first)
    ids = ids.clone()  # no longer of inference mode
    whole = torch.cat([ids, MORE], 1)
    expected = generate(model, whole, **pass_cache(copy.copy(cache)))
    for what, call, message in WRONG:
        with pytest.raises((InputError, UnsupportedError), match=message):
            call(model, cache, ids)
        assert cache.get_seq_length() == 211, what
    assert torch.equal(generate(model, whole, **pass_cache(cache)), expected)


def test_rows_left_by_samples_and_beams_can_be_chosen_from() -> None:
    model = enable(tiny_model("llama"))
    ids = prompts(100)[0]
    for options in ({"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}):
        cache, texts = answered(model, COMPRESSED_MT, ids, **options)
        with pytest.raises(InputError, match=r"the cache holds 3 rows, but 1 came; .* cache.batch_select_indices"):
            generate(model, torch.cat([texts[:1], MORE], 1), **pass_cache(cache))
        cache.batch_select_indices(torch.tensor([0]))
        held = cache.history.ids.long()  # with beams not the best one's last tokens
        generate(model, torch.cat([held, MORE], 1), **pass_cache(cache))
        assert cache.get_seq_length() == 111 + 20 + 11


class Breaks(KeepAll):
    """Stage 1 that breaks off in the prompt of one layer, once armed."""

    def __init__(self) -> None:
        self.left = -1

    def keep(self, *_: Any, **__: Any) -> Tensor | None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return None


@names
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_turn_that_breaks_off_before_any_layer_took_it_in_can_be_made_again(name: str, mode: Any) -> None:
    model, breaks = enable(tiny_model(name)), Breaks()
    config = RocketKVConfig(dense_below=0, token_budget=24, mode=mode, eviction=breaks)
    cache, ids = answered(model, config, prompts(100)[0])
    whole = torch.cat([ids, MORE], 1)
    expected = generate(model, whole, **pass_cache(cache.copy()))
    breaks.left = 1
    with pytest.raises(KeyboardInterrupt):
        generate(model, whole, **pass_cache(cache))
    assert torch.equal(generate(model, whole, **pass_cache(cache)), expected)


@pytest.mark.parametrize("name", ["llama"])
def test_a_turn_that_broke_off_is_told_by_its_layer_and_can_be_taken_back_where_nothing_is_lost(name: str) -> None:
    model, breaks = enable(tiny_model(name)), Breaks()
    for mode in ("single_turn", "multi_turn"):
        config = RocketKVConfig(dense_below=0, token_budget=24, mode=mode, eviction=breaks)
        cache, ids = answered(model, config, prompts(100)[0])
        whole = torch.cat([ids, MORE], 1)
        expected = generate(model, whole, **pass_cache(cache.copy()))
        breaks.left = 2
        with pytest.raises(KeyboardInterrupt):
            generate(model, whole, **pass_cache(cache))
        for refused in (partial(generate, model, whole, **pass_cache(cache)), cache.copy, partial(pickle.dumps, cache)):
            with pytest.raises(InputError, match=r"in layer 1, .* broke off half way; .* or cache.rewind_to\(ids\)"):
                refused()
        if mode == "single_turn":
            with pytest.raises(InputError, match="a single_turn cache goes back over the 0 tokens decoded"):
                cache.rewind_to(whole)
            continue
        assert cache.rewind_to(whole) == 111
        assert torch.equal(generate(model, whole, **pass_cache(cache)), expected)


@modes
def test_an_interrupted_decode_step_can_be_taken_back(config: RocketKVConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable(tiny_model("llama"))
    cache, ids = answered(model, config, prompts(100)[0])
    expected = forward(model, cache.copy(), ids[:, -1:])
    plain, left = LayerCache.decode, [3]

    def interrupted(self: LayerCache, *args: Any, **options: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return plain(self, *args, **options)

    monkeypatch.setattr(LayerCache, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        forward(model, cache, ids[:, -1:])
    with pytest.raises(InputError, match="in layer 2, an earlier forward pass"):
        forward(model, cache, ids[:, -1:])
    assert cache.rewind_to(ids) == 111
    assert torch.equal(forward(model, cache, ids[:, -1:]), expected)


# The way back


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"archive_on_host": True}], ids=["", "int8", "on host"])
@pytest.mark.parametrize("common", [3, 60, 119, 120, 125, 131])
@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_cache_that_went_back_is_one_that_never_saw_more(mode: Any, common: int, options: dict[str, Any]) -> None:
    if mode == "single_turn" and options.get("archive_on_host"):
        pytest.skip("there is no archive")
    model = enable(tiny_model("llama"))
    config = RocketKVConfig(dense_below=0, token_budget=26, mode=mode, window_size=8, kernel_size=5, **options)
    ids, _ = prompts(120)
    cache, text = answered(model, config, ids)
    other = torch.cat([text[:, :common], prompts(40, seed=3)[0]], 1)
    other[:, common] = (text[:, common] + 1) % 100 + 3 if common < 131 else other[:, common]
    fresh = RocketKVCache(model.config, config)
    if mode == "single_turn" and common < 120:
        with pytest.raises(InputError, match="over the 11 tokens decoded since its last prompt only"):
            cache.rewind_to(other)
        assert cache.get_seq_length() == 131
        return
    assert cache.rewind_to(other) == common == cache.get_seq_length()
    forward(model, fresh, text[:, : min(common, 120)])
    for column in range(120, common):
        forward(model, fresh, text[:, column : column + 1])
    fresh.end_turn()
    answers = [generate(model, other, **pass_cache(c)) for c in (cache, fresh)]
    assert torch.equal(*answers)
    steps = [forward(model, c, answers[0][:, -1:]) for c in (cache, fresh)]
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)  # a prompt of other length may round otherwise


@modes
def test_going_back_over_a_long_answer_plans_as_if_it_had_never_been(config: RocketKVConfig) -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(60)
    cache, text = answered(model, config, ids, new=80)  # outgrows its plan on the way
    for left in (100, 75, 60):
        fresh = RocketKVCache(model.config, config)
        forward(model, fresh, ids)
        for column in range(60, left):
            forward(model, fresh, text[:, column : column + 1])
        assert cache.rewind_to(text[:, : left + 1]) == left
        for mine, its in zip(cache.compressed_layers, fresh.compressed_layers, strict=True):
            assert mine.cache.plan is not None
            assert its.cache.plan is not None
            assert mine.cache.plan.splits == its.cache.plan.splits
            assert mine.cache.plan.steps_left == its.cache.plan.steps_left
        steps = [forward(model, c, text[:, left : left + 1]) for c in (cache.copy(), fresh)]
        assert torch.equal(*steps)


def test_an_answer_can_be_given_again() -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(150, 90)
    cache = RocketKVCache(model.config, COMPRESSED_MT)
    first = generate(model, ids, mask, **pass_cache(cache))
    assert cache.rewind_to(ids) == 142  # the last window_size tokens choose anew what is kept
    assert torch.equal(generate(model, ids, mask, **pass_cache(cache)), first)
    assert cache.rewind_to(prompts(40, 40, seed=9)[0]) == 0
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, ids, mask, **pass_cache(cache)), first)


def test_sliding_windows_go_back_only_over_what_they_hold() -> None:
    model = enable(tiny_model("gemma3"))
    cache, text = answered(model, COMPRESSED_MT, prompts(9)[0], new=4)
    other = torch.cat([text[:, :10], MORE], 1)
    other[:, 10] = (text[:, 10] + 1) % 100 + 3
    fresh = RocketKVCache(model.config, COMPRESSED_MT)
    forward(model, fresh, text[:, :9])
    forward(model, fresh, text[:, 9:10])
    assert cache.rewind_to(other) == 10
    assert torch.equal(*(generate(model, other, **pass_cache(c)) for c in (cache, fresh)))
    with pytest.raises(UnsupportedError, match="layer 0 has a sliding window and has dropped what came before"):
        cache.rewind_to(other[:, :20])
    assert cache.get_seq_length() == 30 + 11


def test_what_cannot_go_back_says_so() -> None:
    model = enable(tiny_model("llama"))
    cache, text = answered(model, COMPRESSED_MT, prompts(50)[0])
    for wrong in (text[0], text.float(), text[:, :0], text.tolist()):
        with pytest.raises(InputError, match=r"a tensor of integers \[B, L\]"):
            cache.rewind_to(wrong)
    with pytest.raises(InputError, match="the cache holds 1 rows, not 2"):
        cache.rewind_to(text.repeat(2, 1))
    layer = cache.compressed_layers[0].cache
    for wrong in ([0], [62], [30, 30]):
        with pytest.raises(InputError, match=r"rows that have seen \[61\] tokens cannot go back to"):
            layer.rewind(30, wrong)
    assert RocketKVCache(model.config, COMPRESSED).rewind_to(text) == 0


def test_a_stack_knows_what_its_rows_have_taken_in() -> None:
    model = enable(tiny_model("llama"))
    (one, a), (two, b) = (answered(model, COMPRESSED, prompts(50, seed=seed)[0]) for seed in (1, 2))
    stacked = stack([one, two])
    with pytest.raises(InputError, match="differs from them at token 0"):
        generate(model, torch.cat([torch.cat([b, a]), MORE.repeat(2, 1)], 1), **pass_cache(stacked))
    texts = torch.cat([torch.cat([a, b]), MORE.repeat(2, 1)], 1)
    assert stacked.rewind_to(texts[:, :56]) == 55
    assert stacked.rewind_to(texts) == 55
    generate(model, texts, **pass_cache(stacked))


def test_only_the_new_ids_with_a_mask_of_all() -> None:
    model = enable(tiny_model("llama"))
    outputs = []
    for cache in (DynamicCache(config=model.config), RocketKVCache(model.config, EVERYTHING)):
        text = generate(model, prompts(90)[0], **pass_cache(cache))
        new = torch.cat([text[:, -1:], MORE], 1)
        outputs.append(generate(model, new, torch.ones(1, 101 + 21, dtype=torch.int64), **pass_cache(cache)))
    assert torch.equal(*outputs)


# Whose cache it is


def test_a_cache_of_another_configuration_is_refused() -> None:
    model = enable(tiny_model("llama"))
    ids = prompts(50)[0]
    for changes, message in (
        ({"num_key_value_heads": 4}, "made for KV heads 4 in layer 0, but the model has 2"),
        ({"head_dim": 8}, "made for head dim 8 in layer 0, but the model has 16"),
    ):
        other = type(model.config)(**{**CONFIGS["llama"].to_dict(), **changes})
        with pytest.raises(InputError, match=message):
            generate(model, ids, **pass_cache(RocketKVCache(other, COMPRESSED)))
    gemma = enable(tiny_model("gemma3"))
    windows = type(gemma.config)(**{**CONFIGS["gemma3"].to_dict(), "sliding_window": 32})
    with pytest.raises(InputError, match="made for sliding window 32 in layer 0, but the model has 16"):
        generate(gemma, ids, **pass_cache(RocketKVCache(windows, COMPRESSED)))
    kinds = {**CONFIGS["gemma3"].to_dict(), "layer_types": ["full_attention", "full_attention", "sliding_attention"]}
    with pytest.raises(InputError, match="made for layer kind DynamicLayer in layer 0"):
        generate(gemma, ids, **pass_cache(RocketKVCache(type(gemma.config)(**kinds), COMPRESSED)))


def test_a_cache_that_another_model_has_filled_is_refused() -> None:
    mine, other = enable(tiny_model("llama")), enable(tiny_model("llama"))
    cache, ids = answered(mine, COMPRESSED_MT, prompts(50)[0])
    whole = torch.cat([ids, MORE], 1)
    for c in (cache, cache.copy()):
        with pytest.raises(InputError, match="another model has filled this cache, not this LlamaModel"):
            generate(other, whole, **pass_cache(c))
    expected = generate(mine, whole, **pass_cache(cache.copy()))
    unpickled = pickle.loads(pickle.dumps(cache))  # in another process, where the model is loaded anew
    assert torch.equal(generate(other, whole, **pass_cache(unpickled)), expected)
    del mine
    with pytest.raises(InputError, match="another model has filled this cache"):
        generate(other, whole, **pass_cache(cache))
    cache.reset()
    generate(other, whole, **pass_cache(cache))


@names
@modes
def test_copies_of_every_kind_are_independent(name: str, config: RocketKVConfig) -> None:
    model = enable(tiny_model(name))
    cache = RocketKVCache(model.config, config)
    assert not cache.is_initialized
    ids = generate(model, prompts(150)[0], **pass_cache(cache))
    assert cache.is_initialized
    whole = torch.cat([ids, MORE], 1)
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    copies = [
        copy.copy(cache),
        copy.deepcopy(cache),
        pickle.loads(pickle.dumps(cache)),
        torch.load(buffer, weights_only=False),
    ]
    expected = generate(model, whole, **pass_cache(cache.copy()))
    for copied in copies:
        assert torch.equal(generate(model, whole, **pass_cache(copied)), expected)
        assert cache.get_seq_length() == 161


# What `generate` was given


def longrope() -> PreTrainedModel:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    sizes = {**GROUPED, "max_position_embeddings": 512}
    torch.manual_seed(0)
    config = Phi3Config(**sizes, original_max_position_embeddings=128, rope_parameters={**rope, "factor": 4.0})
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_prompt_beyond_phi3s_short_range_keeps_our_cache_and_crossing_is_refused() -> None:
    model = longrope()
    long, short = prompts(150)[0], prompts(100)[0]
    expected = generate(model, long)
    enable(model)
    cache = RocketKVCache(model.config, EVERYTHING)
    assert torch.equal(generate(model, long, **pass_cache(cache)), expected)
    assert cache.get_seq_length() == 161
    crossing = "Phi3ForCausalLM turns its keys otherwise in texts of more than 128 tokens"
    cache, text = answered(model, EVERYTHING, short)
    with pytest.raises(UnsupportedError, match=crossing):  # with the next turn
        generate(model, torch.cat([text, MORE], 1), **pass_cache(cache))
    with pytest.raises(UnsupportedError, match="Phi3Model turns its keys otherwise"):
        forward(model, cache, MORE)
    assert cache.get_seq_length() == 111
    generate(model, torch.cat([text, MORE[:, :3]], 1), **pass_cache(cache), new=5)  # 120 columns by now
    cache = RocketKVCache(model.config, EVERYTHING)
    with pytest.raises(UnsupportedError, match=crossing):  # while decoding
        generate(model, prompts(120)[0], **pass_cache(cache))
    assert cache.get_seq_length() == 128


def test_a_cache_that_generate_was_given_and_does_not_hand_on_is_noticed() -> None:
    model = enable(tiny_model("llama"))
    ids = prompts(50)[0]
    plain = model.prepare_inputs_for_generation

    def with_a_prefix(*args: Any, **kwargs: Any) -> dict[str, Any]:  # as prefix tuning does
        return {**plain(*args, **kwargs), CACHE_ARGUMENT: DynamicCache(config=model.config)}

    model.prepare_inputs_for_generation = with_a_prefix
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM .* the model gets a DynamicCache instead"):
        generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)))
    generate(model, ids)  # no cache of ours, no concern of ours
    model.prepare_inputs_for_generation = lambda *args, **kwargs: {
        name: value for name, value in plain(*args, **kwargs).items() if name != CACHE_ARGUMENT
    }
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM .* the model gets no cache instead"):
        generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)))
    del model.prepare_inputs_for_generation


def test_a_model_that_is_enabled_generates_batches_as_before() -> None:
    model = tiny_model("llama")
    inputs = [prompts(20)[0][0].tolist(), prompts(31, seed=1)[0][0].tolist()]
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    options = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)

    def batch() -> list[list[int]]:
        outputs = model.generate_batch(
            inputs=inputs, generation_config=options, continuous_batching_config=small, warmup=False
        )
        return [outputs[key].generated_tokens for key in sorted(outputs)]

    plain = batch()
    enable(model)
    assert batch() == plain
    answered(model, COMPRESSED, prompts(50)[0])
    disable(model)
    assert not {"generate", "init_continuous_batching"} & set(vars(model))
    assert batch() == plain


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_autocast_is_followed(name: str) -> None:
    model = tiny_model(name)
    ids = prompts(150)[0]
    full, ours = DynamicCache(config=model.config), RocketKVCache(model.config, EVERYTHING)
    steps = []
    for cache in (full, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            steps.append([forward(model, cache, ids), forward(model, cache, ids[:, :1])])
        enable(model)
    for plain, mine in zip(*steps, strict=True):
        assert mine.dtype == plain.dtype
        torch.testing.assert_close(mine, plain, rtol=0.02, atol=0.05)  # bfloat16 rounds by up to 0.4%
    assert ours.compressed_layers[0].cache.dtype == torch.bfloat16
    cache, text = answered(model, COMPRESSED_MT, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a cache keeps the dtype that it began with
        generate(model, torch.cat([text, MORE], 1), **pass_cache(cache))
    assert cache.compressed_layers[0].cache.dtype == torch.float32
