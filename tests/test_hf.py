"""The cache inside transformers' own `generate`, on tiny models of every architecture that is named as supported."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    DynamicCache,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)

from rocketkv import (
    InputError,
    RocketKVCache,
    RocketKVConfig,
    UnsupportedError,
    disable,
    enable,
)
from rocketkv.cache import RaggedTokens
from rocketkv.eviction import KeepAll, SnapKV
from rocketkv.index import LowBitIndex
from rocketkv.versions import pass_cache
from tiny import CONFIGS, GROUPED, prompts, tiny_model

SMALL = {"window_size": 8, "kernel_size": 5}
EVERYTHING = RocketKVConfig(dense_below=0, token_budget=4096)
COMPRESSED = RocketKVConfig(dense_below=0, token_budget=26, **SMALL)
COMPRESSED_MT = RocketKVConfig(dense_below=0, token_budget=26, mode="multi_turn", **SMALL)
architectures = pytest.mark.parametrize("name", list(CONFIGS))


@torch.inference_mode()
def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, new: int = 12, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)


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


@architectures
def test_an_enabled_model_is_its_old_self_without_our_cache(name: str) -> None:
    model = tiny_model(name)
    ids, mask = prompts(60, 31)
    plain = generate(model, ids, mask)
    implementation = model.config._attn_implementation
    enable(model)
    assert torch.equal(generate(model, ids, mask), plain)
    assert torch.equal(generate(model, ids, mask, **pass_cache(DynamicCache(config=model.config))), plain)
    assert torch.equal(generate(model, ids, mask, use_cache=False), plain)
    disable(model)
    assert model.config._attn_implementation == implementation
    assert not model.get_decoder()._forward_pre_hooks
    assert not model.get_decoder()._forward_hooks
    assert torch.equal(generate(model, ids, mask), plain)
    disable(model)  # once more does no harm
    assert enable(enable(model)) is model


@architectures
def test_memory_goes_and_stats_tell(name: str) -> None:
    model = enable(tiny_model(name))
    ids, mask = prompts(600, 600)
    cache = RocketKVCache(model.config, COMPRESSED)
    assert cache.stats().total.kv_bytes == 0
    generate(model, ids, mask, **pass_cache(cache))
    stats = cache.stats()
    full = DynamicCache(config=model.config)
    generate(model, ids, mask, **pass_cache(full))
    for layer, layer_stats, full_layer in zip(cache.layers, stats.layers, full.layers, strict=True):
        full_bytes = full_layer.keys.nbytes + full_layer.values.nbytes
        assert layer_stats.full_kv_bytes == layer_stats.full_read_bytes == full_bytes
        if layer.is_sliding:
            assert layer_stats.kv_bytes == layer_stats.read_bytes == full_bytes
        else:
            assert layer_stats.num_seen == 611
            assert layer_stats.num_stored == int(layer.cache.num_stored[0, 0])
            assert layer_stats.kv_bytes == layer.cache.kv_bytes < 0.6 * full_bytes
            assert layer_stats.read_bytes == layer.cache.read_bytes < 0.06 * full_bytes
    total = stats.total
    assert total.kv_bytes == sum(layer.kv_bytes for layer in stats.layers)
    assert total.retained_fraction == total.kv_bytes / total.full_kv_bytes
    assert total.compression_factor == total.full_read_bytes / total.read_bytes


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


@architectures
def test_a_second_generate_is_the_next_turn(name: str) -> None:
    model = tiny_model(name)
    first, _ = prompts(90)
    more, _ = prompts(25, seed=1)
    enable(model)
    answers = []
    for cache in (DynamicCache(config=model.config), RocketKVCache(model.config, EVERYTHING)):
        ids = generate(model, first, **pass_cache(cache))
        answers.append(generate(model, torch.cat([ids, more], 1), **pass_cache(cache)))
    assert torch.equal(*answers)
    for config in (COMPRESSED, COMPRESSED_MT):
        cache = RocketKVCache(model.config, config)
        ids = generate(model, first, **pass_cache(cache))
        generate(model, torch.cat([ids, more], 1), **pass_cache(cache))
        assert cache.get_seq_length() == 90 + 12 + 25 + 11
        layer = cache.compressed_layers[-1].cache
        assert layer.num_seen == 138
        if config is COMPRESSED_MT:
            assert layer.working is not None
            assert layer.working.archive is not None
            assert layer.working.archive.max_length == 138


def test_a_second_turn_of_a_padded_batch() -> None:
    model = tiny_model("llama")
    ids, mask = prompts(90, 40)
    more, more_mask = prompts(20, 31, seed=1)
    enable(model)
    outputs = []
    for cache in (DynamicCache(config=model.config), RocketKVCache(model.config, EVERYTHING)):
        first = generate(model, ids, mask, **pass_cache(cache))
        whole_mask = torch.cat([mask, torch.ones(2, 12, dtype=torch.int64), more_mask], 1)
        outputs.append(generate(model, torch.cat([first, more], 1), whole_mask, **pass_cache(cache)))
    assert torch.equal(*outputs)


def test_reset_and_reuse() -> None:
    model = enable(tiny_model("gemma3"))
    ids, mask = prompts(150, 60)
    cache = RocketKVCache(model.config, COMPRESSED)
    first = generate(model, ids, mask, **pass_cache(cache))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.stats().total.kv_bytes == 0
    assert torch.equal(generate(model, ids, mask, **pass_cache(cache)), first)


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


def test_importing_changes_nothing() -> None:
    code = (
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "from transformers.models.llama import modeling_llama\n"
        "def state(): return dict(AttentionInterface()), dict(AttentionMaskInterface()), dict(vars(modeling_llama))\n"
        "before = state()\n"
        "import rocketkv.hooks\n"
        "assert state() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prompt_in_chunks_is_exact_in_multi_turn_and_warned_of_in_single_turn() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(120)
    whole = generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED_MT)))
    chunked = RocketKVCache(model.config, COMPRESSED_MT)
    assert torch.equal(generate(model, ids, **pass_cache(chunked), prefill_chunk_size=50), whole)
    for config, size in ((COMPRESSED, 50), (COMPRESSED_MT, 117)):  # a last chunk of 3 does not fill the window of 8
        cache = RocketKVCache(model.config, config)
        with pytest.warns(UserWarning, match="a second prompt before any token was decoded"):
            generate(model, ids, **pass_cache(cache), prefill_chunk_size=size)


def test_a_window_as_long_as_the_context_is_full_attention_until_it_is_outgrown() -> None:
    model = enable(tiny_model("phi3_long_window"))
    cache = RocketKVCache(model.config, COMPRESSED)
    ids, _ = prompts(2040)
    with pytest.raises(UnsupportedError, match="2049 tokens are more than this model's sliding window of 2048"):
        generate(model, ids, **pass_cache(cache), new=12)


def test_a_fork_of_a_shared_prefill_gives_the_same_tokens() -> None:
    model = enable(tiny_model("gemma3"))
    ids, _ = prompts(200)
    shared = RocketKVCache(
        model.config,
        RocketKVConfig(dense_below=0, token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense"),
    )
    with torch.inference_mode():
        model(input_ids=ids[:, :-8], **pass_cache(shared))
    alone = generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED_MT)))
    for _ in range(2):
        assert torch.equal(generate(model, ids, **pass_cache(shared.fork(COMPRESSED_MT))), alone)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_fork_with_kept_queries_decodes_at_once(name: str) -> None:
    model = enable(tiny_model(name))
    ids, _ = prompts(200)
    dense = RocketKVConfig(
        dense_below=0, token_budget=1, mode="multi_turn", eviction="keep_all", selection="dense", window_size=8
    )
    shared = RocketKVCache(model.config, dense, keep_queries=8)
    with torch.inference_mode():
        first = model(input_ids=ids, **pass_cache(shared)).logits[:, -1].argmax(-1)
        for config in (COMPRESSED, COMPRESSED_MT):
            alone = RocketKVCache(model.config, config)
            assert torch.equal(model(input_ids=ids, **pass_cache(alone)).logits[:, -1].argmax(-1), first)
            fork, token = shared.fork(config), first[:, None]
            for _ in range(10):
                logits = [model(input_ids=token, **pass_cache(cache)).logits for cache in (fork, alone)]
                assert torch.equal(*logits)
                token = logits[0].argmax(-1)


def test_a_copy_of_a_cache_goes_its_own_way() -> None:
    model = enable(tiny_model("gemma3"))
    ids, _ = prompts(200)
    for config in (COMPRESSED, COMPRESSED_MT):
        cache = RocketKVCache(model.config, config)
        following = torch.cat([generate(model, ids, **pass_cache(cache), new=3), prompts(17, seed=1)[0]], 1)
        copies = [cache.copy(), copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        answers = [generate(model, following, **pass_cache(c)) for c in copies]
        assert all(torch.equal(answer, answers[0]) for answer in answers)
        assert cache.get_seq_length() == 202
        assert torch.equal(generate(model, following, **pass_cache(cache)), answers[0])


def test_a_turn_that_ended_may_be_followed_by_another() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(200)
    cache = RocketKVCache(model.config, COMPRESSED)
    with torch.inference_mode():
        model(input_ids=ids, **pass_cache(cache))
        cache.end_turn()
        model(input_ids=ids[:, :5], **pass_cache(cache))  # no warning of chunks, which would be an error here
        with pytest.warns(UserWarning, match="a second prompt before any token was decoded"):
            model(input_ids=ids[:, :5], **pass_cache(cache))


# Memory


def live_token_bytes() -> int:
    """Bytes of all live storages of four-dimensional tensors with this model's two KV heads: keys, values, indices."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor and thing.dim() in (4, 5) and thing.shape[:2] == (1, 2):  # no traced ones
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_prefill_peaks_at_two_full_layers_and_the_compressed_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers, num_tokens = 12, 1500
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**GROUPED, "num_hidden_layers": layers})).eval()
    enable(model)
    samples: list[int] = []

    def measured(owner: type, name: str) -> None:
        """Measure as `owner.name` is called, and again with its result beside its inputs."""
        plain = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            samples.append(live_token_bytes())
            result = plain(*args, **options)
            samples.append(live_token_bytes())
            return result

        monkeypatch.setattr(owner, name, call)

    measured(SnapKV, "keep")
    measured(RaggedTokens, "keep")
    measured(LowBitIndex, "__init__")
    cache = RocketKVCache(model.config, RocketKVConfig(dense_below=0, token_budget=32, window_size=8, kernel_size=5))
    ids, _ = prompts(num_tokens)
    before = live_token_bytes()
    with torch.inference_mode():
        model(input_ids=ids, **pass_cache(cache))
    gc.collect()
    full_layer = 2 * 2 * num_tokens * 16 * 4
    compressed = [layer.cache.kv_bytes for layer in cache.compressed_layers]
    peak = max(samples) - before
    assert len(samples) == 6 * layers
    assert peak > full_layer  # the measurement sees what there is
    assert peak < 2 * full_layer + sum(compressed[:-2])
    assert live_token_bytes() - before <= sum(compressed)  # after prefill nothing of full length is left


def test_no_quadratic_mask_when_nothing_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable(tiny_model("llama"))
    largest = 0
    compare = torch.Tensor.__ge__

    def watched(self: Tensor, other: Any) -> Tensor:
        nonlocal largest
        result = compare(self, other)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__ge__", watched)
    monkeypatch.setattr("rocketkv.hooks.sdpa_mask", lambda *_, **__: pytest.fail("a mask was made"))
    ids, _ = prompts(1800)
    cache = RocketKVCache(model.config, COMPRESSED)
    generate(model, ids, **pass_cache(cache), new=2)
    assert largest <= 8 * 2 * 1800  # the window's own mask, per KV head


# Refusals


def refused(model: PreTrainedModel) -> str:
    with pytest.raises(UnsupportedError) as error:
        enable(model)
    return str(error.value)


def test_architectures_that_do_not_fit_are_refused_by_name() -> None:
    gemma2 = AutoModelForCausalLM.from_config(Gemma2Config(**GROUPED, head_dim=32))
    assert refused(gemma2) == (
        "Gemma2ForCausalLM is not supported: it caps attention logits (softcap); "
        "use it with transformers' own DynamicCache."
    )
    small = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    mla = DeepseekV3Config(
        **small,
        num_key_value_heads=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    assert "DeepseekV3ForCausalLM is not supported: multi-head latent attention" in refused(
        AutoModelForCausalLM.from_config(mla)
    )
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64))
    assert "T5ForConditionalGeneration is not supported: it is an encoder-decoder" in refused(t5)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64))
    assert refused(bloom).startswith("BloomForCausalLM is not supported:")
    sliding = AutoModelForCausalLM.from_config(MistralConfig(**GROUPED, sliding_window=16))
    assert "it has sliding-window layers only, so there is nothing to compress" in refused(sliding)
    sinks = AutoModelForCausalLM.from_config(
        GptOssConfig(**GROUPED, head_dim=32, num_local_experts=2, num_experts_per_tok=1)
    )
    assert "GptOssForCausalLM is not supported: its attention has sinks" in refused(sinks)


def test_assisted_decoding_is_refused() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(50)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model("llama")}):
        with pytest.raises(UnsupportedError, match="cannot be rolled back, so assisted decoding does not work"):
            generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)), **options)


def test_static_caches_are_refused() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(50)
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)), cache_implementation="static")
    assert not RocketKVCache(model.config, COMPRESSED).is_compileable
    # a static cache of transformers' own goes on working, as on any model
    plain = generate(model, ids)
    assert torch.equal(generate(model, ids, **pass_cache(StaticCache(config=model.config, max_cache_len=80))), plain)


def test_a_compiled_forward_gives_the_same_tokens() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(100)
    plain = generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)), new=5)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generate(model, ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)), new=5), plain)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda mask: mask.flip(1), UnsupportedError, "the prompts are padded at the right"),
        (
            lambda mask: mask[:, 1:],
            InputError,
            "attention_mask has 49 columns, but the cache has seen 0 and 50 are new",
        ),
        (lambda mask: mask[:, None, None], UnsupportedError, "give a two-dimensional attention_mask"),
    ],
)
def test_masks_other_than_left_padding_are_refused(change: Any, error: type[Exception], message: str) -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(50, 40)
    with torch.inference_mode(), pytest.raises(error, match=message):
        model(input_ids=ids, attention_mask=change(mask), **pass_cache(RocketKVCache(model.config, COMPRESSED)))


def test_a_mask_that_hides_what_was_taken_in_is_refused() -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(50)
    cache = RocketKVCache(model.config, COMPRESSED)
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask, **pass_cache(cache))
        changed = torch.ones(1, 51, dtype=torch.int64)
        changed[0, 3] = 0
        with pytest.raises(UnsupportedError, match="hides or reveals tokens that the cache has already taken in"):
            model(input_ids=ids[:, :1], attention_mask=changed, **pass_cache(cache))


def test_a_mask_that_moves_the_padding_is_refused() -> None:
    model = enable(tiny_model("llama"))
    ids, mask = prompts(50, 30)
    cache = RocketKVCache(model.config, COMPRESSED)
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask, **pass_cache(cache))
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        moved = torch.cat([mask.flip(1), longer[:, -1:]], 1)  # as many zeros as before, in other columns
        with pytest.raises(UnsupportedError, match="hides or reveals tokens"):
            model(input_ids=ids[:, :1], attention_mask=moved, **pass_cache(cache))
        model(input_ids=ids[:, :1], attention_mask=longer, **pass_cache(cache))
        cache.reorder_cache(torch.tensor([1, 0]))  # the mask goes with its rows
        longer = torch.cat([longer.flip(0), longer[:, -1:]], 1)
        model(input_ids=ids[:, :1], attention_mask=longer, **pass_cache(cache))


def test_other_misuse_is_refused() -> None:
    model = enable(tiny_model("llama"))
    ids, _ = prompts(50)
    with torch.inference_mode():
        with pytest.raises(UnsupportedError, match="no attention weights"):
            model(input_ids=ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)), output_attentions=True)
        deeper = copy.deepcopy(model.config)
        deeper.num_hidden_layers = 5
        deeper.layer_types = None
        with pytest.raises(InputError, match="the cache has 5 layers, the model 3"):
            model(input_ids=ids, **pass_cache(RocketKVCache(deeper, COMPRESSED)))
        with pytest.raises(InputError, match="by keyword"):
            model.get_decoder()(ids, None, None, RocketKVCache(model.config, COMPRESSED))
        with pytest.raises(InputError, match="attention_mask too"):
            model.get_decoder()(ids, torch.ones_like(ids), **pass_cache(RocketKVCache(model.config, COMPRESSED)))
        with pytest.raises(UnsupportedError, match="shares its configuration with a model that is enabled already"):
            enable(AutoModelForCausalLM.from_config(model.config))
        with pytest.raises(UnsupportedError, match="rolled back"):
            RocketKVCache(model.config, COMPRESSED).crop(-1)
    with pytest.raises(UnsupportedError, match="has no gradients"):
        model(input_ids=ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)))


@pytest.mark.parametrize("layer", [1, 2])
def test_a_cache_whose_pass_broke_off_says_so(layer: int) -> None:
    class Breaks(KeepAll):
        calls = 0

        def keep(self, *_: Any, **__: Any) -> Tensor | None:
            self.calls += 1
            if self.calls == layer + 1:
                raise RuntimeError("no luck")
            return None

    model = enable(tiny_model("llama"))
    ids, _ = prompts(150)
    cache = RocketKVCache(model.config, RocketKVConfig(dense_below=0, token_budget=24, eviction=Breaks()))
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="no luck"):
            model(input_ids=ids, **pass_cache(cache))
        with pytest.raises(InputError, match=rf"in layer {layer}, .* broke off half way; call cache.reset\(\)"):
            model(input_ids=ids, **pass_cache(cache))
        cache.reset()


def test_bidirectional_attention_is_refused() -> None:
    config = CONFIGS["gemma3"].to_dict() | {"use_bidirectional_attention": True}
    model = AutoModelForCausalLM.from_config(type(CONFIGS["gemma3"])(**config)).eval()
    ids, _ = prompts(50)
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="its attention is bidirectional"):
        enable(model)(input_ids=ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)))


def test_a_shared_config_that_was_disabled_elsewhere_is_noticed() -> None:
    model = enable(tiny_model("llama"))
    model.set_attn_implementation("sdpa")
    ids, _ = prompts(50)
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="its attn_implementation is now 'sdpa'"):
        model(input_ids=ids, **pass_cache(RocketKVCache(model.config, COMPRESSED)))
