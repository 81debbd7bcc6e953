"""Tests of a cache and its conversation: what continues it, what does not, and what a refusal leaves."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Phi3Config,
    PreTrainedModel,
)

from conversations import MORE, answered, forward, modes, names
from rocketkv import InputError, RocketKVCache, RocketKVConfig, UnsupportedError, enable
from rocketkv.hf.versions import CACHE_ARGUMENT, pass_cache
from tiny import COMPRESSED, COMPRESSED_MT, CONFIGS, EVERYTHING, GROUPED, generate, prompts, tiny_model

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
        "the cache has 1 rows, but 2 came",
    ),
    ("two rows in a forward pass", lambda m, c, ids: forward(m, c, MORE.repeat(2, 1)), "has 1 rows, but 2 came"),
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
        with pytest.raises(InputError, match=r"the cache has 3 rows, but 1 came; .* cache.batch_select_indices"):
            generate(model, torch.cat([texts[:1], MORE], 1), **pass_cache(cache))
        cache.batch_select_indices(torch.tensor([0]))
        held = cache.history.ids.long()  # with beams not the best one's last tokens
        generate(model, torch.cat([held, MORE], 1), **pass_cache(cache))
        assert cache.get_seq_length() == 111 + 20 + 11


def test_only_the_new_ids_with_a_mask_of_all() -> None:
    model = enable(tiny_model("llama"))
    outputs = []
    for cache in (DynamicCache(config=model.config), RocketKVCache(model.config, EVERYTHING)):
        text = generate(model, prompts(90)[0], **pass_cache(cache))
        new = torch.cat([text[:, -1:], MORE], 1)
        outputs.append(generate(model, new, torch.ones(1, 101 + 21, dtype=torch.int64), **pass_cache(cache)))
    assert torch.equal(*outputs)


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
