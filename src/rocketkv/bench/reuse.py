"""A second question about the same document: its first token from a saved cache, and what many forks hold."""

import gc
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rocketkv.bench.timing import OnRound, Pace, Row, run_rounds, timed
from rocketkv.config import RocketKVConfig
from rocketkv.errors import UnsupportedError
from rocketkv.hf import PrefixStore, RocketKVCache, cache_stats
from rocketkv.hf.switch import enable
from rocketkv.hf.versions import pass_cache

QUESTION = 30  # tokens
ANSWER = 8  # tokens that each fork decodes
_ROLLUP = Path("/proc/self/smaps_rollup")


def measure_first_token(
    model: PreTrainedModel, config: RocketKVConfig, seq_len: int, pace: Pace, on_round: OnRound
) -> list[Row]:
    """Time the first token after a document of random tokens and a question, in the same rounds.

    Args:
        model: the model.
        config: `multi_turn`.
        seq_len: tokens of the document.
        pace: for how long to measure.
        on_round: told the number of each round.

    Returns:
        `fresh`, a prompt of document and question; `live`, the question after the document in memory; `file`, loading
        the file and the question; `load`, loading alone, the check of all bytes included. Bytes are those of the cache
        and of the file.
    """
    enable(model)
    document, question = _tokens(model, seq_len), _tokens(model, QUESTION)
    cache = _read(model, config, document)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "document.kv"
        cache.save(path)

        def ask(get: Callable[[], RocketKVCache], text: Tensor) -> float:
            return timed(lambda: _take_in(model, get(), text))

        whole = torch.cat([document, question], 1)
        calls = {
            "fresh": lambda: ask(lambda: RocketKVCache(model.config, config), whole),
            "live": lambda: _ask_copy(model, cache, question),
            "file": lambda: ask(lambda: RocketKVCache.load(path, model), question),
            "load": lambda: timed(lambda: RocketKVCache.load(path, model)),
        }
        times = run_rounds(calls, pace, on_round)
        num_bytes = {"file": path.stat().st_size, "load": path.stat().st_size}
    held = cache_stats(cache).total.kv_bytes
    return [
        Row(name, ms, num_bytes.get(name, held), seq_len, config.token_budget, 1, {"question_tokens": QUESTION})
        for name, ms in times.items()
    ]


def measure_forks(model: PreTrainedModel, config: RocketKVConfig, seq_len: int, num_forks: int) -> dict[str, Any]:
    """Measure the memory of forks of one document, each of which has answered a question of its own.

    Returns:
        `memory_bytes`, what the process holds with the forks beyond what it holds without them, the document
        included; `archive_bytes`, the document's keys and values; `working_bytes`, all working sets with their indices
        and the own tail of each archive; `bound_bytes`, 1.05 times the sum of both.

    Raises:
        UnsupportedError: the system does not tell the proportional set size.
    """
    if not _ROLLUP.exists():
        raise UnsupportedError(f"{_ROLLUP} is not there, which tells what shared memory costs; run this on Linux.")
    enable(model)
    document, store = _tokens(model, seq_len), PrefixStore(model, config)
    first = RocketKVCache(model.config, config)
    for length in (64, QUESTION, 1):  # what the first passes allocate for good
        _take_in(model, first, document[:, :length])
    store.put(_read(model, config, document))
    before = _held_bytes()  # without the stored document, which nothing maps yet
    forks = []
    for _ in range(num_forks):
        question = _tokens(model, QUESTION)
        fork = store.get(torch.cat([document, question], 1))
        _take_in(model, fork, question)
        for _ in range(ANSWER):
            _take_in(model, fork, question[:, :1])
        forks.append(fork)
    memory = _held_bytes() - before
    archive = working = 0
    for fork in forks:
        for layer in fork.compressed_layers:
            held = layer.cache.working
            assert held is not None
            assert held.archive is not None
            token_bytes = held.lengths.numel() * held.token_bytes
            working += held.num_bytes - held.archive.num_bytes + (QUESTION + ANSWER) * token_bytes
            archive += seq_len * token_bytes
    archive //= num_forks
    return {
        "name": "forks",
        "seq_len": seq_len,
        "token_budget": config.token_budget,
        "batch": 1,
        "forks": num_forks,
        "memory_bytes": memory,
        "archive_bytes": archive,
        "working_bytes": working,
        "bound_bytes": int(1.05 * (archive + working)),
    }


def _tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Return random token ids, `[1, count]` int64."""
    return torch.randint(model.config.get_text_config(decoder=True).vocab_size, (1, count))


@torch.inference_mode()
def _take_in(model: PreTrainedModel, cache: RocketKVCache, ids: Tensor) -> None:
    """Run one forward pass over new tokens, up to the logits of the last one."""
    model(input_ids=ids, **pass_cache(cache), logits_to_keep=1)


def _read(model: PreTrainedModel, config: RocketKVConfig, document: Tensor) -> RocketKVCache:
    """Return a cache that has seen a document."""
    cache = RocketKVCache(model.config, config)
    _take_in(model, cache, document)
    cache.end_turn()
    return cache


def _ask_copy(model: PreTrainedModel, cache: RocketKVCache, question: Tensor) -> float:
    """Return the milliseconds of a question to a copy of a cache, which is made before the time begins."""
    copied = cache.copy()
    return timed(lambda: _take_in(model, copied, question))


def _held_bytes() -> int:
    """Return the bytes of this process's own memory and of the shared memory that it maps, where a page counts once.

    Pages of program files do not count: their proportional size changes with what other processes map.
    Free memory that the C library keeps for later is given back before, where the library can (glibc).
    """
    gc.collect()
    give_back = getattr(CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)
    lines = (line.split() for line in _ROLLUP.read_text().splitlines()[1:])
    return sum(int(kib) * 1024 for name, kib, _ in lines if name in ("Pss_Anon:", "Pss_Shmem:"))
