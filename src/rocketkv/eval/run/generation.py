"""One prefill for all methods: they answer from the same forward pass of the prompt, as rows of one batch."""

import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rocketkv.config import RocketKVConfig
from rocketkv.eval.run.methods import FULL, method_config
from rocketkv.hf import RocketKVCache
from rocketkv.hf.batch import batch_caches, row_stats
from rocketkv.hf.models import LoadedModel
from rocketkv.hf.versions import pass_cache
from rocketkv.stats import LayerStats

BATCH_BYTES = 8 * 2**30  # the most bytes of caches that decode together, each counted as a full cache
PIECE = 1024  # tokens of a piece of a long prompt, in models with sliding windows
BASE = method_config(FULL, 1, mode="multi_turn")  # the prefill is dense in every method, so one serves all


class Generated(NamedTuple):
    """The answer of one method.

    Attributes:
        token_ids: the generated tokens, the one that ended the answer included.
        held: what the cache stored and its last decode step read, over all layers.
    """

    token_ids: list[int]
    held: LayerStats


class SharedPrefill:
    """A conversation under several ways to compress, whose prompts run through the model once for all of them.

    A base cache takes in every prompt, uncompressed; for each answer the methods fork from it, decode as rows of one
    batch and are dropped, so that no answer's tokens are ever part of the past. Each row attends through the `decode`
    that users run, to the bit as it would alone; the rest of the model rounds as it does for a batch of that size, so
    a token may differ from the one it gives alone where two logits are as close as that.

    Methods that evict for good cannot fork at a later turn: they must live with what they evicted at the first one. So
    each goes on with a cache of its own beside the base, which takes in later prompts itself.

    Attributes:
        prefill_s: the seconds that the base took for its last prompt.
        decode_s: the seconds that the last answers took together.
    """

    def __init__(self, model: PreTrainedModel, configs: Sequence[RocketKVConfig]) -> None:
        self.model = model
        self.configs = list(configs)
        self.prefill_s = self.decode_s = 0.0
        self._base = RocketKVCache(model.config, BASE, keep_queries=max(c.window_size for c in self.configs))
        self._logits: Tensor | None = None  # [1, V] at the end of the base's last prompt
        self._own: dict[int, tuple[RocketKVCache, Tensor]] = {}  # the same logits for the methods that evict for good

    def take_in(self, token_ids: Sequence[int]) -> None:
        """Prefill a prompt, or what a turn adds to it.

        Raises:
            InputError: the tokens do not fit a cache.
        """
        is_first = self._base.get_seq_length() == 0
        start = time.perf_counter()
        self._logits = self._prefill(self._base, token_ids)
        self.prefill_s = time.perf_counter() - start
        if is_first:
            evicting = {
                i: c for i, c in enumerate(self.configs) if c.mode == "single_turn" and c.eviction != "keep_all"
            }
            self._own = {i: (self._base.fork(config), self._logits) for i, config in evicting.items()}
        else:
            self._own = {i: (cache, self._prefill(cache, token_ids)) for i, (cache, _) in self._own.items()}

    def copy(self) -> "SharedPrefill":
        """Return an independent copy of the conversation."""
        copied = SharedPrefill(self.model, self.configs)
        copied._base, copied._logits = self._base.copy(), self._logits
        copied._own = {i: (cache.copy(), logits) for i, (cache, logits) in self._own.items()}
        return copied

    def answer(self, max_new_tokens: int, stop_ids: Collection[int]) -> list[Generated]:
        """Answer greedily under each configuration, in their order; the conversation stays as it was.

        Raises:
            InputError: a prompt of one token was taken in, from which no method can start.
        """
        assert self._logits is not None
        start = time.perf_counter()
        answers: list[Generated] = []
        rows = max(1, BATCH_BYTES // max(1, self._base.stats().total.kv_bytes))
        for first in range(0, len(self.configs), rows):
            members = range(first, min(first + rows, len(self.configs)))
            cache = batch_caches(
                [self._own[i][0].copy() if i in self._own else self._base.fork(self.configs[i]) for i in members]
            )
            logits = torch.cat([self._own[i][1] if i in self._own else self._logits for i in members])
            answers += decode_greedily(self.model, cache, logits, max_new_tokens, stop_ids)
        self.decode_s = time.perf_counter() - start
        return answers

    def _prefill(self, cache: RocketKVCache, token_ids: Sequence[int]) -> Tensor:
        cache.end_turn()
        return prefill(self.model, cache, token_ids)


def prefill(model: PreTrainedModel, cache: RocketKVCache, token_ids: Sequence[int]) -> Tensor:
    """Return the logits `[1, V]` after a prompt, which `cache` takes in.

    Where nothing is evicted, a model with sliding-window layers takes in a long first prompt in pieces: transformers
    pays the square of a piece's length for the attention of such a layer, most of which the window hides.
    """
    first = 0
    if len(cache.compressed_layers) < len(cache) and cache.config == BASE and cache.get_seq_length() == 0:
        while len(token_ids) - first > 2 * PIECE:  # the last piece has all the queries that stage 1 uses
            forward(model, cache, [token_ids[first : first + PIECE]])
            first += PIECE
    logits = forward(model, cache, [token_ids[first:]])
    if first > 0:
        cache.join_pieces()
    return logits


def forward(model: PreTrainedModel, cache: RocketKVCache, token_ids: Sequence[Sequence[int]] | Tensor) -> Tensor:
    """Return the logits `[rows, V]` after the new tokens `[rows, T]`, which `cache` takes in."""
    input_ids = torch.as_tensor(token_ids, device=model.device)
    logits: Tensor = model(input_ids=input_ids, **pass_cache(cache), logits_to_keep=1).logits
    return logits[:, -1]


def decode_greedily(
    model: PreTrainedModel, cache: RocketKVCache, logits: Tensor, max_new_tokens: int, stop_ids: Collection[int]
) -> list[Generated]:
    """Go on greedily in every row of a stack; a row that has ended leaves the batch.

    Args:
        model: the model, which must be enabled.
        cache: a stack, which loses each row when the row's answer ends.
        logits: the logits of the first new token, `[rows, V]`.
        max_new_tokens: the most tokens of an answer, >= 1.
        stop_ids: the tokens that end an answer.

    Returns:
        The answer of each row.
    """
    token_ids: list[list[int]] = [[] for _ in range(logits.shape[0])]
    held = [LayerStats()] * len(token_ids)
    rows = list(range(len(token_ids)))
    while True:
        chosen = logits.argmax(-1)  # [rows]
        goes_on = []
        for i, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            token_ids[row].append(token)
            if token in stop_ids or len(token_ids[row]) == max_new_tokens:
                held[row] = row_stats(cache, i).total
            else:
                goes_on.append(i)
        if not goes_on:
            return [Generated(*row) for row in zip(token_ids, held, strict=True)]
        if len(goes_on) < len(rows):
            rows = [rows[i] for i in goes_on]
            kept = torch.tensor(goes_on, device=logits.device)
            cache.batch_select_indices(kept)
            chosen = chosen[kept]
        logits = forward(model, cache, chosen[:, None])


def stop_ids(loaded: LoadedModel) -> set[int]:
    """Return the tokens that end an answer, by the model's generation settings and its tokenizer."""
    given = loaded.model.generation_config.eos_token_id
    ids = {*(given if isinstance(given, list) else [given]), loaded.tokenizer.eos_token_id}
    return {i for i in ids if i is not None}
