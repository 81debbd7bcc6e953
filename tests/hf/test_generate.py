"""Tests of the cache inside transformers' own `generate`, on tiny models of every architecture."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    TextIteratorStreamer,
)

from conversations import MORE, answered, architectures, forward
from rocketkv import RocketKVCache, RocketKVConfig, UnsupportedError, enable
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, COMPRESSED_MT, EVERYTHING, generate, prompts, tiny_model


@architectures
def test_a_budget_for_everything_gives_plain_generates_tokens(name: str) -> None:
    model = tiny_model(name)
    one, batch = prompts(150), prompts(150, 90, 33)
    expected = [generate(model, *one), generate(model, *batch)]
    enable(model)
    for (ids, mask), plain in zip([one, batch], expected, strict=True):
        cache = RocketKVCache(model.config, EVERYTHING)
        assert torch.equal(generate(model, ids, mask, **pass_cache(cache)), plain)
        assert cache.get_seq_length() == 150 + 11


@architectures
@pytest.mark.parametrize("config", [COMPRESSED, COMPRESSED_MT], ids=["single_turn", "multi_turn"])
def test_compressed_padded_rows_give_the_tokens_they_give_alone(name: str, config: RocketKVConfig) -> None:
    model = enable(tiny_model(name))
    ids, mask = prompts(150, 90, 17)
    together = generate(model, ids, mask, **pass_cache(RocketKVCache(model.config, config)))
    for row, length in enumerate((150, 90, 17)):
        cache = RocketKVCache(model.config, config)
        alone = generate(model, ids[row : row + 1, 150 - length :], **pass_cache(cache))
        assert together[row, 150:].tolist() == alone[0, length:].tolist()


@pytest.mark.parametrize("config", [EVERYTHING, COMPRESSED, COMPRESSED_MT], ids=["dense", "single_turn", "multi_turn"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3},
    ],
    ids=["beams", "returned beams", "sampling", "samples", "penalty"],
)
def test_ways_of_generating(config: RocketKVConfig, options: dict[str, Any]) -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(120, 77)
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(generate(model, ids, mask, **pass_cache(RocketKVCache(model.config, config)), **options))
    assert torch.equal(*outputs)
    if config is EVERYTHING:
        torch.manual_seed(1)
        assert torch.equal(outputs[0], generate(model, ids, mask, **options))


@pytest.mark.parametrize("config", [COMPRESSED, COMPRESSED_MT], ids=["single_turn", "multi_turn"])
def test_beams_of_padded_rows_are_what_they_are_alone(config: RocketKVConfig) -> None:
    model = enable(tiny_model("llama"))
    lengths = (120, 77, 20)
    ids, mask = prompts(*lengths)
    options = {"num_beams": 3, "new": 20}
    together = generate(model, ids, mask, **pass_cache(RocketKVCache(model.config, config)), **options)
    for row, length in enumerate(lengths):
        cache = RocketKVCache(model.config, config)
        alone = generate(model, ids[row : row + 1, 120 - length :], **pass_cache(cache), **options)
        assert together[row, 120:].tolist() == alone[0, length:].tolist()


def test_beam_search_reorders_the_cache() -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(120)
    seen: list[list[int]] = []

    class Watched(RocketKVCache):
        def reorder_cache(self, beam_idx: Tensor) -> None:
            seen.append(beam_idx.tolist())
            super().reorder_cache(beam_idx)

    generate(model, ids, mask, **pass_cache(Watched(model.config, COMPRESSED)), num_beams=3, new=20)
    assert any(order != sorted(order) or len(set(order)) < 3 for order in seen)


def test_batch_repeat_and_select() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(100, 100)
    cache = RocketKVCache(model.config, COMPRESSED)
    with torch.inference_mode():
        model(input_ids=ids, **pass_cache(cache))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        token = torch.tensor([[5], [7]])
        output = model(input_ids=token, **pass_cache(cache)).logits
        expected = RocketKVCache(model.config, COMPRESSED)
        model(input_ids=ids, **pass_cache(expected))
        torch.testing.assert_close(output, model(input_ids=token, **pass_cache(expected)).logits)


def test_streaming() -> None:
    class Tokenizer:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"<{int(i)}>" for i in ids)

    model = enable(tiny_model("llama"))
    ids, _ = prompts(100)
    streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True)
    cache = RocketKVCache(model.config, COMPRESSED)
    thread = threading.Thread(target=generate, args=(model, ids), kwargs={**pass_cache(cache), "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)))[0, 100:]
    assert text == Tokenizer().decode(expected)


def test_two_models_two_caches_two_threads() -> None:
    models = [enable(tiny_model("llama")), enable(tiny_model("qwen3"))]
    jobs = [
        (model, config, prompts(100 + 10 * i)[0])
        for model in models
        for i, config in enumerate((COMPRESSED, EVERYTHING))
    ]
    expected = [generate(m, ids, **pass_cache(RocketKVCache(m.config, c))) for m, c, ids in jobs]
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        model, config, ids = jobs[index]
        for _ in range(3):
            results[index] = generate(model, ids, **pass_cache(RocketKVCache(model.config, config)))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, tokens in enumerate(expected):
        assert torch.equal(results[index], tokens)


def test_a_window_as_long_as_the_context_is_full_attention_until_it_is_outgrown() -> None:
    model = enable(tiny_model("phi3_long_window"))
    cache = RocketKVCache(model.config, COMPRESSED)
    ids, _ = prompts(2040)
    with pytest.raises(UnsupportedError, match="2049 tokens are more than this model's sliding window of 2048"):
        generate(model, ids, **pass_cache(cache), new=12)


def test_a_compiled_forward_gives_the_same_tokens() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(100)
    plain = generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)), new=5)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)), new=5), plain)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_autocast_is_followed(name: str) -> None:
    model = tiny_model(name)
    ids = prompts(150)[0]
    full, ours = DynamicCache(config=model.config), RocketKVCache(model.config, EVERYTHING)
    whole = DynamicCache(config=model.config)
    exact = [forward(model, whole, ids), forward(model, whole, ids[:, :1])]
    steps = []
    for cache in (full, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            steps.append([forward(model, cache, ids), forward(model, cache, ids[:, :1])])
        enable(model)
    for plain, mine, expected in zip(*steps, exact, strict=True):
        assert mine.dtype == plain.dtype
        assert (mine - expected).norm() <= 2 * (plain - expected).norm()
    assert ours.compressed_layers[0].cache.dtype == torch.bfloat16
    cache, text = answered(model, COMPRESSED_MT, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a cache keeps the dtype that it began with
        generate(model, torch.cat([text, MORE], 1), **pass_cache(cache))
    assert cache.compressed_layers[0].cache.dtype == torch.float32
