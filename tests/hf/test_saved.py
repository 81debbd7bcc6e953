"""A cache that was saved and loaded answers to the token what the cache that never left memory answers."""

import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conversations import MORE, answered, forward, modes
from rocketkv import (
    Budget,
    CacheFileError,
    InputError,
    RocketKVCache,
    RocketKVConfig,
    UnsupportedError,
    enable,
    tensor_file,
)
from rocketkv.eviction import KeepAll
from rocketkv.hf import batch_caches
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, COMPRESSED_MT, CONFIGS, generate, prompts, tiny_model

OPTIONS: dict[str, dict[str, Any]] = {
    "single_turn": {},
    "multi_turn": {"mode": "multi_turn"},
    "int8": {"mode": "multi_turn", "kv_dtype": "int8"},
    "int8_single_turn": {"kv_dtype": "int8"},
    "on_host": {"mode": "multi_turn", "archive_on_host": True},
    "on_host_int8": {"mode": "multi_turn", "archive_on_host": True, "kv_dtype": "int8"},
    "hybrid": {"mode": "multi_turn", "selection": "hybrid"},
    "own_budget": {"budget": Budget(20, 2, 8, 12)},
    "reference": {"mode": "multi_turn", "backend": "reference"},
}
every_option = pytest.mark.parametrize("option", list(OPTIONS))


def config_of(option: str) -> RocketKVConfig:
    small = {"dense_below": 0, "token_budget": 26, "window_size": 8, "kernel_size": 5}
    return RocketKVConfig(**small | OPTIONS[option])


def reloaded(cache: RocketKVCache, model: PreTrainedModel, folder: Path) -> RocketKVCache:
    cache.save(folder / "cache.kv")
    return RocketKVCache.load(folder / "cache.kv", model)


def assert_alike(live: RocketKVCache, loaded: RocketKVCache, work: Callable[[RocketKVCache], Tensor]) -> None:
    """Both give the same answer, and hold and read the same."""
    assert torch.equal(work(loaded), work(live))
    assert torch.equal(loaded.history.ids, live.history.ids)
    for mine, its in zip(loaded.compressed_layers, live.compressed_layers, strict=True):
        assert mine.cache.row_seen == its.cache.row_seen
        assert torch.equal(mine.cache.positions, its.cache.positions)
        for name in ("num_seen", "num_decoded", "just_prefilled", "read_bytes"):
            assert getattr(mine.cache, name) == getattr(its.cache, name), name


@every_option
@pytest.mark.parametrize("num_decoded", [0, 15])
def test_it_decodes_and_takes_the_next_turn_as_the_live_one(option: str, num_decoded: int, tmp_path: Path) -> None:
    model = enable(tiny_model("llama"))
    live, text = RocketKVCache(model.config, config_of(option)), prompts(100)[0]
    forward(model, live, text)
    tokens = prompts(num_decoded + 20, seed=3)[0].split(1, 1)
    for token in tokens[:num_decoded]:
        forward(model, live, token)
    loaded = reloaded(live, model, tmp_path)
    for token in tokens[num_decoded:]:  # beyond the plan of the prompt
        assert_alike(live, loaded, partial(forward, model, ids=token))
    turn = torch.cat([text, *tokens, MORE], 1)
    assert_alike(live, loaded, lambda cache: generate(model, turn, **pass_cache(cache)))


@modes
@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_goes_on_after_an_answer(name: str, config: RocketKVConfig, tmp_path: Path) -> None:
    model = enable(tiny_model(name))
    live, text = answered(model, config, prompts(100)[0])
    loaded = reloaded(live, model, tmp_path)
    turn = torch.cat([text, MORE], 1)
    assert_alike(live, loaded, lambda cache: generate(model, turn, **pass_cache(cache)))
    loaded = reloaded(loaded, model, tmp_path)  # a loaded cache is saved like any other
    assert_alike(live, loaded, lambda cache: forward(model, cache, MORE))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@modes
def test_padded_batches_beams_and_rows(name: str, config: RocketKVConfig, tmp_path: Path) -> None:
    model = enable(tiny_model(name))
    ids, mask = prompts(100, 40, 77)
    live, text = answered(model, config, ids, mask=mask)
    loaded = reloaded(live, model, tmp_path)
    more = torch.cat([text, prompts(20, 20, 20, seed=7)[0]], 1)
    mask = torch.cat([mask, torch.ones(3, 32, dtype=torch.int64)], 1)
    assert_alike(live, loaded, lambda cache: generate(model, more, mask, **pass_cache(cache)))
    for cache in (live, loaded):
        cache.batch_repeat_interleave(2)
    loaded = reloaded(loaded, model, tmp_path)
    again, mask = live.history.ids[::2].long(), torch.cat([mask, torch.ones(3, 11, dtype=torch.int64)], 1)
    again, mask = torch.cat([again, MORE.repeat(3, 1)], 1), torch.cat([mask, torch.ones(3, 20, dtype=torch.int64)], 1)
    assert_alike(live, loaded, lambda cache: generate(model, again, mask, num_beams=2, **pass_cache(cache)))
    for cache in (live, loaded):
        cache.batch_select_indices(torch.tensor([2, 0]))
    assert_alike(live, loaded, lambda cache: forward(model, cache, text[:2, -1:]))


@every_option
@pytest.mark.parametrize("common", [60, 104])  # in the prompt, and in what was decoded
def test_it_goes_back_as_the_live_one(option: str, common: int, tmp_path: Path) -> None:
    model = enable(tiny_model("llama"))
    live, text = answered(model, config_of(option), prompts(100)[0])
    loaded = reloaded(live, model, tmp_path)
    other = torch.cat([text[:, :common], prompts(30, seed=5)[0]], 1)
    other[:, common] = (text[:, common] + 1) % 100 + 3
    if common == 60 and loaded.config.mode == "single_turn":
        for cache in (live, loaded):
            with pytest.raises(InputError, match="a single_turn cache goes back over the 11 tokens decoded"):
                cache.rewind_to(other)
        return
    assert live.rewind_to(other) == loaded.rewind_to(other) == common
    loaded = reloaded(loaded, model, tmp_path)  # also when a prompt must come next
    assert_alike(live, loaded, lambda cache: generate(model, other, **pass_cache(cache)))


def test_it_is_forked_and_copied_as_the_live_one(tmp_path: Path) -> None:
    model = enable(tiny_model("llama"))
    live = RocketKVCache(model.config, COMPRESSED_MT, keep_queries=8)
    forward(model, live, prompts(100)[0])
    loaded = reloaded(live, model, tmp_path)
    for change in (lambda cache: cache.fork(COMPRESSED), RocketKVCache.copy, lambda c: pickle.loads(pickle.dumps(c))):
        assert_alike(change(live), change(loaded), lambda cache: forward(model, cache, MORE[:, :1]))


@pytest.mark.parametrize("inference", [False, True])
def test_caches_of_one_file_do_not_see_what_the_others_write(inference: bool, tmp_path: Path) -> None:
    model = enable(tiny_model("llama"))
    live, text = answered(model, COMPRESSED_MT, prompts(100)[0])
    live.save(tmp_path / "cache.kv")
    content = (tmp_path / "cache.kv").read_bytes()
    with torch.inference_mode(inference):
        forks = [RocketKVCache.load(tmp_path / "cache.kv", model) for _ in range(3)]
    for i, fork in enumerate(forks):
        turn = torch.cat([text, prompts(20, seed=20 + i)[0]], 1)
        assert torch.equal(*(generate(model, turn, **pass_cache(c)) for c in (fork, live.copy())))
    assert (tmp_path / "cache.kv").read_bytes() == content
    (tmp_path / "cache.kv").unlink()  # what is mapped stays
    for i, fork in enumerate(forks):
        assert fork.get_seq_length() == 112 + 20 + 11
        assert torch.equal(fork.history.ids[:, 112:132], prompts(20, seed=20 + i)[0].int())
        forward(model, fork, text[:, -1:])


def test_a_file_belongs_to_its_owner_and_replaces_another_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = enable(tiny_model("llama"))
    live, _ = answered(model, COMPRESSED, prompts(100)[0])
    path = tmp_path / "cache.kv"
    path.write_text("something else")
    path.chmod(0o644)
    live.save(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()

    def fails(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(CacheFileError, match=r"cannot be written \(No space left on device\); give a path in a folder"):
        live.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["cache.kv"]


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    model = enable(tiny_model("llama"))
    path = tmp_path / "cache.kv"
    with pytest.raises(InputError, match=r"no forward pass .* has filled this cache"):
        RocketKVCache(model.config, COMPRESSED).save(path)
    live, text = answered(model, COMPRESSED, prompts(60)[0])
    with pytest.raises(InputError, match=r"after pickle, the next token first"):
        pickle.loads(pickle.dumps(live)).save(path)
    with pytest.raises(UnsupportedError, match="a stack of caches cannot be saved"):
        batch_caches([live.copy(), live.copy()]).save(path)
    own = RocketKVConfig(token_budget=26, window_size=8, eviction=KeepAll())
    with pytest.raises(UnsupportedError, match="eviction=KeepAll, an object of your own, cannot be saved"):
        answered(model, own, text)[0].save(path)
    for wrong, reason in ((tmp_path, "is no file that could be replaced"), (tmp_path / "no" / "x", "No such file")):
        with pytest.raises(CacheFileError, match=reason):
            live.save(wrong)
    assert list(tmp_path.iterdir()) == []


def test_another_model_dtype_or_version_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = enable(tiny_model("llama"))
    answered(model, COMPRESSED, prompts(60)[0])[0].save(tmp_path / "cache.kv")

    def refused(other: PreTrainedModel) -> str:
        with pytest.raises(CacheFileError) as caught:
            RocketKVCache.load(tmp_path / "cache.kv", other)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    trained = tiny_model("llama")
    with torch.no_grad():
        trained.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
    assert "other weights than the model at hand" in refused(trained)
    turned = tiny_model("llama")
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 5e5}
    for other in (turned, tiny_model("qwen2"), tiny_model("gemma3"), tiny_model("llama", num_hidden_layers=2)):
        assert "another configuration than the model at hand" in refused(other)
    assert "was made in float32, but the model computes in bfloat16; load the model in float32" in refused(
        tiny_model("llama").bfloat16()
    )
    monkeypatch.setattr("rocketkv.tensor_file.VERSION", 2)
    assert "has format version '1', and this rocketkv reads version 2" in refused(model)


def test_the_same_model_loaded_again_goes_on(tmp_path: Path) -> None:
    live_model = enable(tiny_model("llama"))
    live, text = answered(live_model, COMPRESSED, prompts(60)[0])
    live.save(tmp_path / "cache.kv")
    model = tiny_model("llama")
    model.config.pad_token_id = 5
    loaded = RocketKVCache.load(tmp_path / "cache.kv", model)  # before it is enabled
    turn = torch.cat([text, MORE], 1)
    answers = [generate(m, turn, **pass_cache(c)) for m, c in ((enable(model), loaded), (live_model, live))]
    assert torch.equal(*answers)


def test_a_forged_file_whose_checksums_fit_is_refused_before_a_kernel_reads_it(tmp_path: Path) -> None:
    model, path = enable(tiny_model("llama")), tmp_path / "cache.kv"
    live, _ = answered(model, COMPRESSED_MT, prompts(60)[0])
    for name, forged in (
        ("shape", [1, 2, 64]),
        ("dtype", "float7"),
        ("seen", [10_000]),
        ("archive", [[10_000, 10_000]]),
        ("lengths", [[10_000, 1]]),
        ("lengths", [[-1, -1]]),
        ("plan", {"splits": [[1, 99, 12]], "limits": [100]}),
        ("plan", {"splits": [], "limits": []}),
        ("plan", {"splits": [[1, 8, 12]], "limits": [1]}),
        ("plan", {"splits": [[1, 8, 12]] * 2, "limits": [100]}),
        ("num_decoded", "many"),
        ("observed", [[1], 1.0, True]),
    ):
        tensors, record = live.parts()
        record["layers"][1][name] = forged
        tensor_file.save(path, tensors, record)
        with pytest.raises(CacheFileError, match="holds no cache that this rocketkv can make"):
            RocketKVCache.load(path, model)
    tensors, record = live.parts()
    positions = tensors["0.tokens.positions"]
    assert isinstance(positions, tensor_file.Rows)
    tensors["0.tokens.positions"] = positions._replace(tokens=positions.tokens + 1000)
    tensor_file.save(path, tensors, record)
    with pytest.raises(CacheFileError, match="positions beyond what was seen"):
        RocketKVCache.load(path, model)
    tensors, record = live.parts()
    values = tensors["0.archive.values"]
    assert isinstance(values, tensor_file.Rows)
    tensors["0.archive.values"] = values._replace(capacity=values.capacity - 1)
    tensor_file.save(path, tensors, record)
    with pytest.raises(CacheFileError, match="room for different numbers of tokens"):
        RocketKVCache.load(path, model)
    tensors, record = live.parts()
    ids = tensors["ids"]
    assert isinstance(ids, Tensor)
    tensors["ids"] = ids[:, :50]
    tensor_file.save(path, tensors, record)
    with pytest.raises(CacheFileError, match="50 token ids for"):
        RocketKVCache.load(path, model)
    record["model"], record["layers"] = {}, []
    tensor_file.save(path, tensors, record)
    with pytest.raises(CacheFileError, match="holds no cache that this rocketkv can make"):
        RocketKVCache.load(path, model)
