"""A store gives forks at the longest beginning that a text shares with one read before, and shares the archive."""

import os
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from conversations import MORE, answered, forward, modes, names
from rocketkv import (
    InputError,
    OutOfMemoryError,
    PrefixStore,
    RocketKVCache,
    RocketKVConfig,
    UnsupportedError,
    enable,
)
from rocketkv.hf.past import SavedPast
from rocketkv.hf.shelf import Folder
from rocketkv.hf.versions import pass_cache
from rocketkv.ragged import RaggedTokens
from tiny import COMPRESSED, COMPRESSED_MT, generate, prompts, tiny_model

DOCUMENT = prompts(100)[0]
kept_in = pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])


def question(seed: int) -> Tensor:
    return torch.cat([DOCUMENT, prompts(20, seed=seed)[0]], 1)


def read(model: Any, store: PrefixStore, ids: Tensor) -> RocketKVCache:
    cache = RocketKVCache(model.config, store.config)
    forward(model, cache, ids)
    cache.end_turn()
    store.put(cache)
    return cache


@kept_in
@modes
@names
def test_questions_about_a_stored_document_are_answered_as_by_its_own_cache(
    name: str, config: RocketKVConfig, in_folder: bool, tmp_path: Path
) -> None:
    model = enable(tiny_model(name))
    store = PrefixStore(model, config, folder=tmp_path / "store" if in_folder else None)
    assert store.get(question(1)).get_seq_length() == 0
    live = read(model, store, DOCUMENT)
    forks = [store.get(question(seed)) for seed in (1, 2)]
    for seed, fork in zip((1, 2), forks, strict=True):
        assert fork.get_seq_length() == 100
        assert torch.equal(*(generate(model, question(seed), **pass_cache(c)) for c in (fork, live.copy())))
    assert store.get(prompts(90, seed=4)[0]).get_seq_length() == 0
    store.clear()
    assert store.num_bytes == 0
    forward(model, forks[0], MORE)  # a fork outlives what it was made of


@kept_in
def test_a_text_that_parts_earlier_goes_on_from_where_it_parts(in_folder: bool, tmp_path: Path) -> None:
    model = enable(tiny_model("llama"))
    store = PrefixStore(model, COMPRESSED_MT, folder=tmp_path if in_folder else None)
    read(model, store, DOCUMENT[:, :50])
    cache = store.get(question(1))
    assert cache.get_seq_length() == 50
    text = generate(model, question(1), **pass_cache(cache))
    store.put(cache)
    rewritten = torch.cat([text[:, :110], MORE], 1)  # as a template that drops what was thought
    rewritten[:, 110] = (text[:, 110] + 1) % 100 + 3
    fork, expected = store.get(rewritten), cache.copy()
    assert fork.get_seq_length() == expected.rewind_to(rewritten) == 110
    assert torch.equal(*(generate(model, rewritten, **pass_cache(c)) for c in (fork, expected)))
    assert store.get(text[:, :-1]).get_seq_length() == text.shape[1] - 2  # one token at least is left to take in


def test_the_least_recently_used_are_given_up(tmp_path: Path) -> None:
    model = enable(tiny_model("llama"))
    texts = [prompts(60, seed=seed)[0] for seed in range(3)]
    for folder in (None, tmp_path):
        store = PrefixStore(model, COMPRESSED_MT, folder=folder)
        read(model, store, texts[0])
        size = store.num_bytes
        store = PrefixStore(model, COMPRESSED_MT, folder=folder, max_bytes=2 * size)
        for text in texts[:2]:
            read(model, store, text)
        more = [torch.cat([text, MORE], 1) for text in texts]
        assert store.get(more[0]).get_seq_length() == 60  # used again
        read(model, store, texts[2])
        assert [store.get(text).get_seq_length() for text in more] == [60, 0, 60]
        store.clear()
        with pytest.warns(UserWarning, match=f"takes more than the max_bytes={size - 1} of its store"):
            read(model, PrefixStore(model, COMPRESSED_MT, folder=folder, max_bytes=size - 1), texts[0])


def test_the_order_of_use_does_not_depend_on_the_clock_of_the_file_system(tmp_path: Path) -> None:
    shelf = Folder(tmp_path, 1 << 20)
    names = [f"{number:016x}-{number:032x}.kv" for number in range(20)]
    for name in names:
        shelf.write(name, {"x": torch.zeros(1)}, {})
    assert list(shelf.paths()) == names[::-1]
    for name in names:
        assert shelf.touch(name)
    assert list(shelf.paths()) == names[::-1]


def test_a_folder_keeps_models_and_options_apart_and_is_its_owners_alone(tmp_path: Path) -> None:
    model, other = enable(tiny_model("llama")), enable(tiny_model("qwen2"))
    folder = tmp_path / "a" / "store"
    read(model, PrefixStore(model, COMPRESSED_MT, folder=folder), DOCUMENT)
    for its, config in ((other, COMPRESSED_MT), (model, COMPRESSED)):
        assert PrefixStore(its, config, folder=folder).get(question(1)).get_seq_length() == 0
    assert PrefixStore(model, COMPRESSED_MT, folder=folder).get(question(1)).get_seq_length() == 100
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"the folder .* cannot be made"):
        PrefixStore(model, COMPRESSED_MT, folder=tmp_path / "file")


def test_a_damaged_file_is_told_removed_and_read_anew(tmp_path: Path) -> None:
    model = enable(tiny_model("llama"))
    read(model, PrefixStore(model, COMPRESSED_MT, folder=tmp_path), DOCUMENT)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    store = PrefixStore(model, COMPRESSED_MT, folder=tmp_path)
    with pytest.warns(UserWarning, match="a stored cache was removed, as it cannot be used: .* is damaged"):
        assert store.get(question(1)).get_seq_length() == 0
    assert list(tmp_path.iterdir()) == []


def test_stores_and_threads_share_a_folder_while_others_clear_it(tmp_path: Path) -> None:
    model = enable(tiny_model("llama", num_hidden_layers=1))
    live = read(model, PrefixStore(model, COMPRESSED_MT, folder=tmp_path), DOCUMENT)
    seen: list[int] = []

    def work(turns: int) -> None:
        store = PrefixStore(model, COMPRESSED_MT, folder=tmp_path)
        for turn in range(turns):
            store.put(live)
            seen.append(store.get(question(turn)).get_seq_length())
            if turn % 3 == 2:
                store.clear()

    threads = [Thread(target=work, args=(12,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 36
    assert set(seen) <= {0, 100}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_a_store_cannot_know_is_refused() -> None:
    model = enable(tiny_model("llama"))
    store = PrefixStore(model, COMPRESSED_MT)
    cache = RocketKVCache(model.config, COMPRESSED)
    forward(model, cache, DOCUMENT)
    with pytest.raises(InputError, match="of another model or configuration than the store"):
        store.put(cache)
    cache = RocketKVCache(model.config, COMPRESSED_MT)
    with torch.inference_mode():
        model(inputs_embeds=model.get_input_embeddings()(DOCUMENT), **pass_cache(cache))
    with pytest.raises(InputError, match="came without ids, by which a store knows texts"):
        store.put(cache)


@modes
@names
def test_the_header_of_a_file_tells_how_far_its_cache_goes_back(name: str, config: RocketKVConfig) -> None:
    model = enable(tiny_model(name))
    live, text = answered(model, config, prompts(60)[0])
    past = SavedPast.read(*reversed(live.parts()))
    for common in (0, 5, 20, 59, 60, 65, 70, 71):
        for length in (common + 1, common + 3, common + 40):
            other = torch.cat([text[:, :common], 3 + (text[:, common:] + 1) % 90, text], 1)[:, :length]
            copied = live.copy()
            try:
                left = copied.rewind_to(other)
            except (InputError, UnsupportedError):
                left = 0
            assert past.columns_left(other, config.window_size) == left, (common, length)


@kept_in
def test_the_cache_that_leaves_the_most_is_taken_and_no_other_is_read(
    in_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = enable(tiny_model("llama"))
    for mode, longest, ids in (
        (COMPRESSED_MT, DOCUMENT[:, :55], DOCUMENT[:, :60]),  # the window of the text must be read anew
        (COMPRESSED, DOCUMENT[:, :40], torch.cat([DOCUMENT[:, :90], MORE], 1)),
    ):
        store = PrefixStore(model, mode, folder=tmp_path / mode.mode if in_folder else None)
        for text in (longest, DOCUMENT, DOCUMENT[:, :30]):
            read(model, store, text)
        with monkeypatch.context() as patched:
            loads = Mock(wraps=RocketKVCache.from_parts)
            patched.setattr(RocketKVCache, "from_parts", loads)
            assert store.get(ids).get_seq_length() == longest.shape[1]
        loads.assert_called_once()


def test_what_killed_processes_left_half_written_is_told_from_what_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shelf = enable(tiny_model("llama")), Folder(tmp_path, 2**30)
    store = PrefixStore(model, COMPRESSED_MT, folder=tmp_path)
    live = read(model, store, DOCUMENT)
    (name,) = shelf.paths()
    left = tmp_path / f".{name}.abc"
    others = [tmp_path / ".report.kv.abc", tmp_path / f".{name}.begun"]
    others[0].write_text("not the store's")
    others[1].touch()  # its process has not locked it yet
    for clean in (store.clear, lambda: store.put(live)):
        left.write_text("half a document")
        assert shelf.half_written() == {left: 15}
        clean()
        assert not left.exists()
        assert all(path.exists() for path in others)
    store.clear()
    during: list[dict[Path, int]] = []
    monkeypatch.setattr(os, "fsync", lambda file: during.append(shelf.half_written()))
    store.put(live)
    assert during == [{}]
    assert store.num_bytes > 0


def test_where_memory_ends_no_stored_cache_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable(tiny_model("llama"))
    store = PrefixStore(model, COMPRESSED_MT, folder=tmp_path)
    live = read(model, store, DOCUMENT)
    with monkeypatch.context() as patched:
        patched.setattr(RaggedTokens, "keep", lambda *_: torch.empty(1 << 60))
        with pytest.raises(OutOfMemoryError, match=r"not enough memory to load the cache .*you tried to allocate"):
            store.get(question(1))
    for error in (MemoryError(), RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)")):
        with monkeypatch.context() as patched:
            patched.setattr("rocketkv.tensor_file.safe_open", Mock(side_effect=error))
            with pytest.raises(OutOfMemoryError, match="not enough memory to map a saved cache"):
                store.get(question(1))
    assert store.get(question(1)).get_seq_length() == 100
    in_memory = PrefixStore(model, COMPRESSED_MT)
    with monkeypatch.context() as patched:
        patched.setattr("rocketkv.tensor_file.write", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OutOfMemoryError, match=r"kept in memory \(No space left on device\); lower the store's"):
            in_memory.put(live)
    in_memory.put(live)
    assert in_memory.get(question(1)).get_seq_length() == 100


def test_a_padded_text_shares_nothing_with_one_without_padding() -> None:
    model = enable(tiny_model("llama"))
    store = PrefixStore(model, COMPRESSED_MT)
    mask = torch.ones_like(DOCUMENT)
    mask[:, :5] = 0
    padded = RocketKVCache(model.config, store.config)
    with torch.inference_mode():
        model(input_ids=DOCUMENT, attention_mask=mask, **pass_cache(padded))
    padded.end_turn()
    store.put(padded)
    longer = torch.cat([mask, torch.ones_like(mask[:, :20])], 1)
    assert store.get(question(1)).get_seq_length() == 0
    assert store.get(question(1), longer).get_seq_length() == 100


def test_other_files_in_the_folder_are_not_the_stores(tmp_path: Path) -> None:
    model, report = enable(tiny_model("llama")), tmp_path / "report.kv"
    read(model, PrefixStore(model, COMPRESSED_MT), DOCUMENT).save(report)
    store = PrefixStore(model, COMPRESSED_MT, folder=tmp_path, max_bytes=1)
    with pytest.warns(UserWarning, match="max_bytes"):
        read(model, store, DOCUMENT)
    store.clear()
    assert report.is_file()


@kept_in
def test_a_cache_that_cannot_fit_leaves_the_others(in_folder: bool, tmp_path: Path) -> None:
    model = enable(tiny_model("llama"))
    folder = tmp_path if in_folder else None
    measured = PrefixStore(model, COMPRESSED_MT)
    read(model, measured, DOCUMENT)
    store = PrefixStore(model, COMPRESSED_MT, folder=folder, max_bytes=measured.num_bytes)
    read(model, store, DOCUMENT)
    with pytest.warns(UserWarning, match="takes more than the max_bytes"):
        read(model, store, prompts(1500)[0])
    assert store.get(question(1)).get_seq_length() == 100
