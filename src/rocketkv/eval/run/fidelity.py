"""Measures how close a compressed cache stays to the full one on real text, teacher-forced: no labels, little noise.

A prefix is prefilled, then the text's own next tokens are decoded. Freely: each method's rows against the full cache's
logits. And along the full cache's trace: layer by layer, every method is given the full cache's queries, keys and
values, and its attention is compared with the full one's.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rocketkv.attention import LayerCache
from rocketkv.eval.run.generation import BASE, BATCH_BYTES, forward, prefill
from rocketkv.eval.run.journal import Journal
from rocketkv.eval.run.methods import FULL, Arm
from rocketkv.eval.run.passages import STEPS, Passage
from rocketkv.eval.run.records import Record, digest
from rocketkv.eval.run.runner import OnProgress
from rocketkv.hf import RocketKVCache, RocketKVLayer
from rocketkv.hf.batch import batch_caches, row_stats
from rocketkv.hf.models import LoadedModel
from rocketkv.hf.padding import Padding
from rocketkv.hf.progress import prefill_progress
from rocketkv.hf.switch import enable
from rocketkv.ops import NO_TERMS, LogitTerms
from rocketkv.stats import LayerStats

OnStep = Callable[[float, float], None]  # forward passes done, the prefill's counted by layer, of how many
Advance = Callable[[float], None]  # by how many

SUITE = "fidelity"
BINS = 32  # parts of the prefix, in each of which the kept tokens are counted


class Step(NamedTuple):
    """The inputs and the output of one layer of the full cache for one token."""

    query: Tensor  # [1, Hq, 1, D]
    key: Tensor  # [1, Hkv, 1, D]
    value: Tensor  # [1, Hkv, 1, D]
    scale: float
    terms: LogitTerms
    output: Tensor  # [1, Hq, 1, D]


class Free(NamedTuple):
    """How a method predicts the text."""

    agreement: float
    kl: float
    perplexity: float
    held: LayerStats


def run(
    loaded: LoadedModel,
    passages: Sequence[Passage],
    arms: Sequence[Arm],
    journal: Journal,
    on_progress: OnProgress,
) -> None:
    """Run what the journal does not have yet, passage by passage.

    Raises:
        InputError: a passage differs from the one in an earlier run.
    """
    enable(loaded.model)
    journal.begin()
    for number, passage in enumerate(passages):
        on_progress(number, len(passages))
        missing = journal.missing(passage.case, arms, digest(passage.token_ids))
        if missing:
            journal.append(measure(loaded, passage, missing))
    on_progress(len(passages), len(passages))


@torch.inference_mode()
def measure(loaded: LoadedModel, passage: Passage, arms: Sequence[Arm]) -> list[Record]:
    """Return all figures of a passage, as a record per arm."""
    length = passage.case.length
    assert length is not None
    start = time.perf_counter()
    base = _prefill(loaded, passage.token_ids[:length], arms)
    prefill_s = time.perf_counter() - start
    start = time.perf_counter()
    full, trace = _follow_full(loaded, base, passage.token_ids[length:])
    free = _predict(loaded, base, passage.token_ids[length:], arms, full)
    decode_s = time.perf_counter() - start
    figures = _compare_layers(base, trace, arms)
    return [
        {
            "suite": SUITE,
            "task": passage.case.task,
            "id": passage.case.id,
            "length": length,
            "depth": None,
            "turn": 0,
            "turns": 1,
            "method": arm.method,
            "token_budget": arm.token_budget,
            "prediction": "",
            "scores": {"score": one.agreement},
            "agrees": None,
            "prompt": digest(passage.token_ids),
            "prompt_tokens": length,
            "new_tokens": STEPS,
            "read_bytes": one.held.read_bytes,
            "kv_bytes": one.held.kv_bytes,
            "group_size": loaded.group_size,
            "prefill_s": round(prefill_s, 4),
            "decode_s": round(decode_s, 4),
            "rows": len(arms),
            "agreement": one.agreement,
            "kl": one.kl,
            "perplexity": one.perplexity,
            **layers,
        }
        for arm, one, layers in zip(arms, free, figures, strict=True)
    ]


@torch.inference_mode()
def predict(
    loaded: LoadedModel, token_ids: Sequence[int], length: int, arms: Sequence[Arm], on_step: OnStep
) -> list[Free]:
    """Return how every arm predicts a text, without the figures by layer.

    Args:
        loaded: the model, which must be enabled, and its tokenizer.
        token_ids: `length` to prefill, then those to decode, and one more to predict.
        length: the number of tokens to prefill, >= 2.
        arms: the methods and their budgets.
        on_step: a function that is called after each layer of the prefill and each decoded token of each arm.

    Returns:
        The predictions of each arm, in their order.
    """
    layers = len(getattr(loaded.model.get_decoder(), "layers", ()))
    done, total = 0.0, layers + 2.0 * (len(token_ids) - length - 1)

    def advance(share: float) -> None:
        nonlocal done
        done += share
        on_step(done, total)

    on_step(done, total)
    with prefill_progress(loaded.model, lambda *_: advance(1)):
        base = _prefill(loaded, token_ids[:length], arms)
    full, _ = _follow_full(loaded, base, token_ids[length:], advance)
    return _predict(loaded, base, token_ids[length:], arms, full, advance)


def _prefill(loaded: LoadedModel, token_ids: Sequence[int], arms: Sequence[Arm]) -> RocketKVCache:
    """Return a cache that has seen all of the prefix, from which every arm can fork."""
    windows = [BASE.window_size, *(arm.config().window_size for arm in arms)]
    base = RocketKVCache(loaded.model.config, BASE, keep_queries=max(windows))
    prefill(loaded.model, base, token_ids)
    return base


class _Recorder(RocketKVLayer):
    """A layer that records the inputs and the output of its attention."""

    def __init__(self, layer: RocketKVLayer) -> None:
        super().__init__(layer.cache, layer.window)
        self.steps: list[Step] = []

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Padding,
        scale: float | None,
        terms: LogitTerms = NO_TERMS,
    ) -> Tensor:
        """Attend as the layer does, and record the step."""
        output: Tensor = super().attend(query, key, value, padding, scale, terms)
        factor = query.shape[3] ** -0.5 if scale is None else scale
        self.steps.append(Step(query.clone(), key.clone(), value.clone(), factor, terms, output.clone()))
        return output


def _follow_full(
    loaded: LoadedModel, base: RocketKVCache, token_ids: Sequence[int], advance: Advance = lambda _: None
) -> tuple[Tensor, list[list[Step]]]:
    """Return the full cache's log-probabilities `[STEPS, V]` and the steps of each of its compressed layers."""
    cache = base.fork(BASE)
    cache.layers[:] = [_Recorder(layer) if isinstance(layer, RocketKVLayer) else layer for layer in cache.layers]
    logits = []
    for token in token_ids[:-1]:
        logits.append(forward(loaded.model, cache, [[token]]))
        advance(1)
    recorded = [layer.steps for layer in cache.layers if isinstance(layer, _Recorder)]
    return torch.cat(logits).float().log_softmax(-1), recorded


def _predict(
    loaded: LoadedModel,
    base: RocketKVCache,
    token_ids: Sequence[int],
    arms: Sequence[Arm],
    full: Tensor,
    advance: Advance = lambda _: None,
) -> list[Free]:
    """Return every arm's predictions of the text against the full cache's `[STEPS, V]`."""
    free: list[Free] = []
    rows = max(1, BATCH_BYTES // max(1, base.stats().total.kv_bytes))
    for first in range(0, len(arms), rows):
        members = arms[first : first + rows]
        cache = batch_caches([base.fork(arm.config()) for arm in members])
        agreed, kl, nll = (torch.zeros(len(members), device=full.device) for _ in range(3))
        for step, (token, following) in enumerate(pairwise(token_ids)):
            logits = forward(loaded.model, cache, [[token]] * len(members)).float().log_softmax(-1)
            agreed += logits.argmax(-1) == full[step].argmax()
            kl += (full[step].exp() * (full[step] - logits)).sum(-1)
            nll -= logits[:, following]
            advance(len(members) / len(arms))
        steps = len(token_ids) - 1
        for row in range(len(members)):
            mean = [float(x[row]) / steps for x in (agreed, kl, nll)]
            free.append(Free(mean[0], max(0.0, mean[1]), math.exp(mean[2]), row_stats(cache, row).total))
    return free


def _compare_layers(
    base: RocketKVCache, trace: Sequence[Sequence[Step]], arms: Sequence[Arm]
) -> list[dict[str, list[Any]]]:
    """Return lists by layer, for each arm but the full cache: what stage 1 kept, output error and recall.

    `output_error`: distance of the attention's output from the full one's relative to its norm, the mean over heads and
    steps. `recall`: attention mass of the tokens attended to, relative to that of as many best ones as the budget has;
    the mean over KV heads and steps. `kept`: share of the prefix's tokens kept in each of `BINS` equal parts of it.
    """
    figures: list[dict[str, list[Any]]] = [
        {} if arm.method == FULL else {"output_error": [], "recall": [], "kept": []} for arm in arms
    ]
    for layer, steps in zip(base.compressed_layers, trace, strict=True):
        masses = _attention_masses(layer.cache, steps)  # [Hkv, STEPS, N]
        for arm, lists in zip(arms, figures, strict=True):
            if lists:
                for name, value in _compare_layer(layer.cache, steps, masses, arm).items():
                    lists[name].append(value)
    return figures


def _compare_layer(cache: LayerCache, steps: Sequence[Step], masses: Tensor, arm: Arm) -> dict[str, Any]:
    """Return one layer's figures of an arm on the full cache's trace; `masses` is from `_attention_masses`."""
    fork = cache.fork(arm.config())
    kept = _kept_shares(fork)
    best = masses.topk(min(arm.token_budget or 0, masses.shape[2])).values.sum(-1)  # [Hkv, STEPS]
    fork.trace = True
    errors, reached = [], []
    for number, step in enumerate(steps):
        output = fork.decode(step.query, step.key, step.value, scale=step.scale, terms=step.terms)
        errors.append(((output - step.output).float().norm(dim=-1) / step.output.float().norm(dim=-1)).mean())
        assert fork.last_attended is not None
        attended = fork.last_attended[0]  # [Hkv, tokens so far]
        reached.append((masses[:, number, : attended.shape[1]] * attended).sum(-1))
    return {
        "output_error": _rounded(torch.stack(errors).mean()),
        "recall": _rounded((torch.stack(reached, 1) / best).mean()),
        "kept": kept,
    }


def _attention_masses(cache: LayerCache, steps: Sequence[Step]) -> Tensor:
    """Return each step's full attention to every token, averaged over a KV head's heads, `[Hkv, STEPS, N]`."""
    past = cache.keys()
    keys = torch.cat([past, *(step.key for step in steps)], dim=2)[0].float()  # [Hkv, N, D]
    query = torch.cat([step.query for step in steps], dim=2)[0].float()  # [Hq, STEPS, D]
    grouped = query.reshape(keys.shape[0], -1, *query.shape[1:])  # [Hkv, G, STEPS, D]
    positions = torch.arange(keys.shape[1], device=keys.device)
    last = past.shape[2] + torch.arange(len(steps), device=keys.device)
    logits = steps[0].terms.cap((grouped @ keys[:, None].transpose(2, 3)) * steps[0].scale)
    logits = logits.masked_fill(positions > last[:, None], -torch.inf)  # [Hkv, G, STEPS, N]
    masses: Tensor = steps[0].terms.softmax(logits.flatten(0, 1)[None]).view_as(logits).mean(1)
    return masses


def _kept_shares(cache: LayerCache) -> list[float]:
    """Return the share of kept tokens in each of `BINS` parts of the seen tokens, over all KV heads."""
    seen = cache.num_seen
    bins = torch.arange(seen, device=cache.positions.device) * BINS // seen
    positions = cache.positions[cache.positions >= 0]
    held = bins[positions].bincount(minlength=BINS) / cache.positions.shape[1]
    return [_rounded(x) for x in held / bins.bincount(minlength=BINS).clamp(min=1)]


def _rounded(x: Tensor) -> float:
    return round(float(x), 5)
