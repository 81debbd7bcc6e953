"""Compares forms of the low-bit key index and sizes of stage 1 by the error of attention's output at equal bytes.

A model reads a piece of each text, from its middle, in one forward; queries, keys and values of some layers are kept
on disk. For each prefix, stage 1 keeps what its last queries looked at, and each form chooses, for some of the next 256
tokens, what to attend to. A form is given the same bytes at each of these steps: a budget of t tokens is
`t * 2 * head_dim` elements of 16 bits a KV head. What a form reads to score is counted in full: codes, steps, zeros
and the 16-bit keys of the last group while it is not full; what is left attends. The error is the distance from full
attention's output relative to its norm, the mean over heads, steps and layers. "Above the oracle" is the error less
that of the exact top-k of t tokens out of all, whose scoring is not counted, over the same of the published method:
the mean over prefixes and texts, and the worst. Keys and values are bfloat16 numbers, arithmetic is float32.

    .venv/bin/python benchmarks/forms.py persuasion.txt northanger_abbey.txt --cache build/forms --json forms.json

Half an hour on one core; `--axes` takes less. The axis "size" ends with a fit of stage 1's size, on the first text at
all lengths but the last, checked on everything else.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from rocketkv.budget import held_tokens, split_selection
from rocketkv.errors import InputError, RocketKVError
from rocketkv.eviction import SnapKV
from rocketkv.index import PageIndex
from rocketkv.models import load
from rocketkv.ops import choose_tokens, hybrid_logits, score_tokens

NEW_TOKENS = 256  # of the text, after the prefix
WINDOW = 32  # last queries of the prefix that stage 1 asks
KERNEL = 63
PAGE, PAGE_CHANNELS = 4, 8  # of the coarse level
ALL = math.inf


@dataclass(frozen=True)
class Form:
    """One way to choose tokens.

    Attributes:
        scoring: what estimates logits: low-bit keys; page bounds, as published; or the logits themselves, not counted.
        held: stage 1 keeps this many times what the paper's formula says.
        size: stage 1 keeps a * t**b * length**c instead, given as (a, b, c).
        share: of the budget, what scoring may take.
        bits: per code; 16: the keys themselves.
        group: tokens that share a step.
        symmetric: codes around zero, no zero point.
        rotated: queries and keys multiplied by a Hadamard matrix or by the principal axes of the kept keys, uncounted.
        centred: the mean of the kept keys is taken off before quantization.
        channels: which are read: the largest of the sum over heads of |q|, times the range or deviation of the kept
            keys, the largest in any head, or those of the prefix's last queries.
        temperature: SparQ's, by the share of |q| that is read.
        heads: how the heads of a group agree.
        by_value: scores are multiplied by the values' norms, 8 bits per token.
        sinks: first tokens pinned.
        recents: last tokens pinned, as a part of top_k.
        coarse: pages, by bounds along few channels, decide which half of the tokens has its low-bit keys read.
        mass: attend until this part of the approximate attention is reached.
        tail: what stands for the tokens not attended to: nothing, their weight, or their weight and mean value.
        attended_bits: 16, or 8: quantized keys and values are attended to.
    """

    scoring: Literal["lowbit", "pages", "exact"] = "lowbit"
    held: float = 1.0
    size: tuple[float, float, float] | None = None
    share: float = 0.5
    bits: int = 4
    group: int = 64
    symmetric: bool = False
    rotated: Literal["no", "hadamard", "principal"] = "no"
    centred: bool = False
    channels: Literal["sum", "range", "deviation", "max", "static"] = "sum"
    temperature: bool = False
    heads: Literal["mean", "max"] = "mean"
    by_value: bool = False
    sinks: int = 0
    recents: float = 1 / 8
    coarse: bool = False
    mass: float = 1.0
    tail: Literal["none", "weight", "mean"] = "none"
    attended_bits: int = 16


BASE = Form()
ORACLE = Form("exact", held=ALL, recents=0)
PUBLISHED = Form("pages", recents=0)
REFERENCES = {"oracle": ORACLE, "published": PUBLISHED, "base": BASE}
SIZES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, ALL)


def vary(name: str, *values: Any) -> dict[str, Form]:
    """Forms that differ from the base in one field."""
    return {
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}": replace(BASE, **{name: value})
        for value in values
    }


TAILED: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "temperature": {"temperature": True},
    "deviation": {"channels": "deviation"},
    "range": {"channels": "range"},
    "deviation, temperature": {"channels": "deviation", "temperature": True},
    "group 32": {"group": 32},
    "share 1/4": {"share": 1 / 4},
    "share 1/3": {"share": 1 / 3},
    "share 2/3": {"share": 2 / 3},
    "heads max": {"heads": "max"},
    "coarse": {"coarse": True},
    "no pins": {"recents": 0.0},
    "held 1.4": {"held": 1.4},
    "held 2": {"held": 2.0},
    "held 2, 2 bits": {"held": 2.0, "bits": 2},
    "held 4, 2 bits": {"held": 4.0, "bits": 2},
    "published": {"scoring": "pages", "recents": 0},
    "8 bits attended": {"attended_bits": 8},
}
AXES: dict[str, dict[str, Form]] = {
    "bounds": {
        "kept, exact top-k": Form("exact", recents=0),
        "published, recents pinned": replace(PUBLISHED, recents=1 / 8),
    },
    "bits": vary("bits", 2, 3, 8, 16),
    "group": vary("group", 32, 128, 256),
    "channels": vary("channels", "range", "deviation", "max", "static"),
    "temperature": {"temperature": replace(BASE, temperature=True)},
    "share": vary("share", 1 / 4, 1 / 3, 2 / 3),
    "size": {
        f"{bits} bits, held={held:g}": replace(BASE, bits=bits, held=held) for bits in (4, 3, 2) for held in SIZES
    },
    "zero": {
        "symmetric": replace(BASE, symmetric=True),
        "symmetric, centred": replace(BASE, symmetric=True, centred=True),
        "centred": replace(BASE, centred=True),
    },
    "rotation": {
        **vary("rotated", "hadamard", "principal"),
        "hadamard, 2 bits": replace(BASE, rotated="hadamard", bits=2),
        "principal, 2 bits": replace(BASE, rotated="principal", bits=2),
    },
    "heads": {"heads=max": replace(BASE, heads="max"), "by value": replace(BASE, by_value=True)},
    "pins": {**vary("recents", 0.0, 1 / 16, 1 / 4), "sinks=4": replace(BASE, sinks=4)},
    "levels": {"coarse": replace(BASE, coarse=True)},
    "stop": vary("mass", 0.95, 0.99),
    "tail": vary("tail", "weight", "mean"),
    "attended": vary("attended_bits", 8),
    "best": {
        "2 bits": replace(BASE, bits=2),
        "2 bits, share 1/4": replace(BASE, bits=2, share=1 / 4),
        "2 bits, share 1/6": replace(BASE, bits=2, share=1 / 6),
        "3 bits, share 1/4": replace(BASE, bits=3, share=1 / 4),
        "4 bits, share 1/4": replace(BASE, share=1 / 4),
        "2 bits, share 1/4, held 2": replace(BASE, bits=2, share=1 / 4, held=2.0),
        "2 bits, share 1/4, held 0.7": replace(BASE, bits=2, share=1 / 4, held=0.7),
        "3 bits, share 1/4, held 0.7": replace(BASE, bits=3, share=1 / 4, held=0.7),
        "3 bits, share 1/4, 5t": replace(BASE, bits=3, share=1 / 4, size=(5.0, 1.0, 0.0)),
        "2 bits, share 1/4, tail": replace(BASE, bits=2, share=1 / 4, tail="mean"),
        "3 bits, share 1/4, tail": replace(BASE, bits=3, share=1 / 4, tail="mean"),
        "4 bits, share 1/3, coarse, tail": replace(BASE, share=1 / 3, coarse=True, tail="mean"),
        "3 bits, share 1/3, tail": replace(BASE, bits=3, share=1 / 3, tail="mean"),
        "3 bits, share 1/3, held 0.7, tail": replace(BASE, bits=3, share=1 / 3, held=0.7, tail="mean"),
        "oracle, tail": replace(ORACLE, tail="mean"),
        "kept, exact top-k, tail": Form("exact", recents=0, tail="mean"),
        "published, tail": replace(PUBLISHED, tail="mean"),
    },
    "mean tail": {f"tail, {name}": replace(BASE, tail="mean", **changes) for name, changes in TAILED.items()},
}


class Trace(NamedTuple):
    """What a layer was given: queries `[Hq, T, D]`, keys and values `[Hkv, T, D]`, bfloat16."""

    query: Tensor
    key: Tensor
    value: Tensor


class Held(NamedTuple):
    """What stage 1 kept of a case, and all tokens since."""

    prompt_tokens: int
    keys: Tensor  # [Hkv, M, D]
    values: Tensor  # [Hkv, M, D]
    logits: Tensor  # [P, Hkv, G, M], exact
    lengths: Tensor  # [P] int64, tokens that each step has, itself included


class Plan(NamedTuple):
    """What each of the steps reads; each `[P]` int64."""

    page_size: Tensor
    channels: Tensor
    top_k: Tensor


class Outcome(NamedTuple):
    """How a form did: means over steps."""

    error: float
    attended: float
    channels: float
    read_tokens: float  # worth of keys and values, for scoring and attention
    held: int


class Case:
    """Some decode steps of one layer after one prefix."""

    def __init__(self, trace: Trace, length: int, steps: int) -> None:
        """Take `steps` evenly spread of the NEW_TOKENS steps after the first `length` tokens."""
        query, key, value = (x[:, : length + NEW_TOKENS].float() for x in trace)
        self.length = length
        self.keys, self.values = key, value
        self.ages = torch.linspace(1, NEW_TOKENS, steps).long()  # [P], tokens since the prefix, the step's own included
        grouped = query.reshape(key.shape[0], -1, *query.shape[1:])  # [Hkv, G, T, D]
        self.query = grouped[:, :, length - 1 + self.ages].permute(2, 0, 1, 3).contiguous()  # [P, Hkv, G, D]
        self.window = query[None, :, length - WINDOW : length]  # [1, Hq, W, D]
        self.scale = key.shape[2] ** -0.5
        logits = dot(self.query, key) * self.scale
        beyond = torch.arange(key.shape[1]) >= (length + self.ages)[:, None]
        self.logits = logits.masked_fill(beyond[:, None, None], -torch.inf)
        self.full = mix(self.logits.softmax(-1), value)
        self._held: dict[int, Held] = {}

    def hold(self, num_tokens: int) -> Held:
        """Let stage 1 keep `num_tokens` of the prefix."""
        if num_tokens not in self._held:
            self._held[num_tokens] = self._keep(num_tokens)
        return self._held[num_tokens]

    def _keep(self, num_tokens: int) -> Held:
        if num_tokens >= self.length:
            return Held(self.length, self.keys, self.values, self.logits, self.length + self.ages)
        prefix = self.keys[None, :, : self.length]
        stays = SnapKV(WINDOW, KERNEL).keep(
            self.window,
            prefix,
            lengths=torch.full(prefix.shape[:2], self.length),
            num_queries=torch.tensor([WINDOW]),
            num_tokens=torch.tensor([num_tokens]),
            scale=self.scale,
        )
        assert stays is not None
        kept = stays[0].nonzero()[:, 1].reshape(prefix.shape[1], num_tokens)
        new = torch.arange(self.length, self.keys.shape[1]).expand(kept.shape[0], -1)
        places = torch.cat([kept, new], 1)  # [Hkv, M]
        rows = places[..., None].expand(-1, -1, self.keys.shape[2])
        logits = self.logits.gather(3, places[None, :, None].expand(*self.logits.shape[:3], -1))
        return Held(num_tokens, self.keys.gather(1, rows), self.values.gather(1, rows), logits, num_tokens + self.ages)


def dot(query: Tensor, keys: Tensor) -> Tensor:
    """Products of `[P, Hkv, G, D]` with `[Hkv, M, D]`: `[P, Hkv, G, M]`."""
    steps, heads, group, _ = query.shape
    products = query.transpose(0, 1).flatten(1, 2) @ keys.transpose(1, 2)
    result: Tensor = products.reshape(heads, steps, group, -1).transpose(0, 1)
    return result


def mix(weights: Tensor, values: Tensor) -> Tensor:
    """Sums of `[Hkv, M, D]` with weights `[P, Hkv, G, M]`: `[P, Hkv, G, D]`."""
    return dot(weights, values.transpose(1, 2))


def keep_count(form: Form, length: int, budget: int) -> int:
    """Tokens of the prefix that stage 1 keeps."""
    if form.size is not None:
        factor, power, rest = form.size
        count = factor * budget**power * length**rest
    else:
        count = form.held * held_tokens(length, budget)
    return int(min(max(count, WINDOW), length))


def make_plan(form: Form, held: Held, budget: int) -> Plan | None:
    """Spend the budget, for each step anew; None: the form cannot score within it."""
    head_dim = held.keys.shape[2]
    splits = []
    for length in held.lengths.tolist():
        if form.scoring == "exact":
            splits.append((1, head_dim, budget))
        elif form.scoring == "pages":
            splits.append(split_selection(length, budget, head_dim))
        elif length <= budget:
            splits.append((1, head_dim, length))  # all of it is attended, nothing scored
        else:
            split = split_lowbit(form, length, budget, head_dim)
            if split is None:
                return None
            splits.append(split)
    return Plan(*torch.tensor(splits).unbind(1))


def split_lowbit(form: Form, length: int, budget: int, head_dim: int) -> tuple[int, int, int] | None:
    """Page size (not used), channels and top_k for low-bit keys of so many tokens."""
    total = budget * 4 * head_dim  # bytes
    fixed, scored = 0.0, 1.0
    if form.coarse:
        fixed, scored = 2 * PAGE_CHANNELS * math.ceil(length / PAGE), 0.5
    fixed += length * form.by_value + 4 * head_dim * (form.tail == "mean")
    channels = int((form.share * total - fixed) / (scored * channel_bytes(form, length)))
    channels = min(channels, head_dim)
    left = total - fixed - channels * scored * channel_bytes(form, length)
    top_k = int(left / token_bytes(form, head_dim))
    return (1, channels, top_k) if channels >= 1 and top_k >= 1 else None


def channel_bytes(form: Form, length: int) -> float:
    """Bytes of one channel of all tokens."""
    if form.bits == 16:
        return 2 * length
    tail = length % form.group
    return (length - tail) * (form.bits / 8 + (2 if form.symmetric else 4) / form.group) + 2 * tail


def token_bytes(form: Form, head_dim: int) -> int:
    """Bytes of a token that is attended to; with 8 bits a step for its key and one for its value."""
    return 4 * head_dim if form.attended_bits == 16 else 2 * head_dim + 4


def read_tokens(form: Form, held: Held, plan: Plan, attended: Tensor) -> float:
    """Mean bytes of a step, as tokens' worth of keys and values; `attended` `[P]`."""
    head_dim = held.keys.shape[2]
    scored = []
    for length, page_size, channels, top_k in zip(*(x.tolist() for x in (held.lengths, *plan)), strict=True):
        if form.scoring == "exact":
            scored.append(2.0 * head_dim * length)
        elif form.scoring == "pages":
            scored.append(2.0 * channels * math.ceil(length / page_size))
        elif top_k < length:
            cost = channels * channel_bytes(form, length) * (0.5 if form.coarse else 1)
            cost += 2 * PAGE_CHANNELS * math.ceil(length / PAGE) * form.coarse
            scored.append(cost + length * form.by_value + 4 * head_dim * (form.tail == "mean"))
        else:
            scored.append(0.0)
    read: float = statistics.mean(scored) + float(attended.mean()) * token_bytes(form, head_dim)
    return read / (4 * head_dim)


def quantize(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Round `[..., n, D]` to codes of so many bits, with the n rows of a channel in one group; 16-bit steps."""
    if symmetric:
        most = (1 << bits - 1) - 1
        step = (x.abs().amax(-2, keepdim=True) / most).bfloat16().float().clamp_min(1e-20)
        return (x / step).round().clamp(-most, most) * step
    low = x.amin(-2, keepdim=True).bfloat16().float()
    most = (1 << bits) - 1
    step = ((x.amax(-2, keepdim=True) - low) / most).bfloat16().float().clamp_min(1e-20)
    return low + ((x - low) / step).round().clamp(0, most) * step


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix of equal entries; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(size)


def rotate(form: Form, case: Case, held: Held) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[P, Hkv, G, D]`, keys `[Hkv, M, D]` and the window's queries `[W, Hkv, G, D]`, rotated alike."""
    window = case.window.reshape(held.keys.shape[0], -1, WINDOW, held.keys.shape[2]).permute(2, 0, 1, 3)
    if form.rotated == "no":
        return case.query, held.keys, window
    if form.rotated == "hadamard":
        matrix = hadamard(held.keys.shape[2]).expand(held.keys.shape[0], -1, -1)
    else:
        prompt = held.keys[:, : held.prompt_tokens]
        centred = prompt - prompt.mean(1, keepdim=True)
        matrix = torch.linalg.eigh(centred.transpose(1, 2) @ centred).eigenvectors  # [Hkv, D, D]
    return case.query @ matrix, held.keys @ matrix, window @ matrix


def pick_channels(form: Form, query: Tensor, window: Tensor, prompt: Tensor, channels: Tensor) -> Tensor:
    """Mark the channels that each step reads, `[P, Hkv, 1, D]` bool; `prompt` `[Hkv, N, D]`, `channels` `[P]`."""
    size = query.abs().amax(2) if form.channels == "max" else query.abs().sum(2)  # [P, Hkv, D]
    if form.channels == "range":
        size = size * (prompt.amax(1) - prompt.amin(1))
    elif form.channels == "deviation":
        size = size * prompt.std(1)
    elif form.channels == "static":
        size = window.abs().mean((0, 2)).expand_as(size)
    rank = size.argsort(2, descending=True).argsort(2)
    return (rank < channels[:, None, None])[:, :, None]


def lowbit(form: Form, case: Case, held: Held, plan: Plan) -> Tensor:
    """Approximate logits `[P, Hkv, G, M]` by low-bit keys, the last group's by its 16-bit keys."""
    query, keys, window = rotate(form, case, held)
    prompt = keys[:, : held.prompt_tokens]
    chosen = pick_channels(form, query, window, prompt, plan.channels)
    read = query * chosen
    if form.centred:
        keys = keys - prompt.mean(1, keepdim=True).bfloat16().float()
    logits = dot(read, keys)
    if form.bits < 16:
        whole = keys.shape[1] // form.group * form.group
        groups = keys[:, :whole].reshape(keys.shape[0], -1, form.group, keys.shape[2])
        coded = dot(read, quantize(groups, form.bits, form.symmetric).flatten(1, 2))
        is_whole = torch.arange(whole) < (held.lengths // form.group * form.group)[:, None]  # [P, whole]
        logits[..., :whole] = coded.where(is_whole[:, None, None], logits[..., :whole])
    scale = torch.tensor(case.scale)
    if form.temperature:
        share = read.abs().sum(3, keepdim=True) / query.abs().sum(3, keepdim=True)
        scale = case.scale / share.sqrt()
    return logits * scale


def page_logits(case: Case, held: Held, page_size: Tensor, channels: Tensor) -> Tensor:
    """The published logits `[P, Hkv, G, M]`, one step at a time."""
    keys = held.keys.bfloat16()[None]
    logits = []
    for step in range(len(held.lengths)):
        one = slice(step, step + 1)
        index = PageIndex(keys, held.lengths[one, None].expand(-1, keys.shape[1]).contiguous(), page_size[one])
        logits.append(
            hybrid_logits(
                case.query[one],
                index.bounds,
                page_size=page_size[one],
                num_tokens=keys.shape[2],
                num_channels=channels[one],
                scale=case.scale,
            )
        )
    return torch.cat(logits)


def score(form: Form, case: Case, held: Held, plan: Plan) -> Tensor:
    """What each token is worth to each step, `[P, Hkv, M]`, 0 beyond its length."""
    lengths = held.lengths[:, None].expand(-1, held.keys.shape[0])
    if form.scoring == "exact":
        logits = held.logits
    elif form.scoring == "pages":
        logits = page_logits(case, held, plan.page_size, plan.channels)
    else:
        logits = lowbit(form, case, held, plan)
    if form.coarse:
        pages = score_tokens(
            page_logits(
                case, held, torch.full_like(plan.channels, PAGE), torch.full_like(plan.channels, PAGE_CHANNELS)
            ),
            lengths,
        )
        none = torch.zeros_like(held.lengths)
        order = choose_tokens(pages, lengths=lengths, top_k=held.lengths // 2, sinks=none, recents=none)
        read = torch.zeros_like(pages, dtype=torch.bool)
        ok = torch.arange(order.shape[2]) < (held.lengths // 2)[:, None, None]
        read.scatter_(2, order.where(ok, order[:, :, :1]), True)
        logits = logits.masked_fill(~read[:, :, None], -torch.inf)
    scores = score_tokens(logits, lengths)
    if form.heads == "max":
        beyond = torch.arange(logits.shape[3]) >= held.lengths[:, None]
        scores = logits.masked_fill(beyond[:, None, None], -torch.inf).softmax(-1).amax(2)
    if form.by_value:
        scores = scores * held.values.norm(dim=-1)
    return scores


def measure(form: Form, case: Case, budget: int) -> Outcome | None:
    """Run all steps of a case; None: the form cannot score within its budget."""
    held = case.hold(keep_count(form, case.length, budget))
    plan = make_plan(form, held, budget)
    if plan is None:
        return None
    lengths = held.lengths[:, None].expand(-1, held.keys.shape[0])
    scores = score(form, case, held, plan)
    pins = [torch.full_like(plan.top_k, form.sinks), (plan.top_k * form.recents).long()]
    chosen = choose_tokens(scores, lengths=lengths, top_k=plan.top_k, sinks=pins[0], recents=pins[1])  # [P, Hkv, K]
    counts = plan.top_k.minimum(held.lengths)[:, None, None]
    attends = torch.arange(chosen.shape[2]) < counts
    part = scores.gather(2, chosen)
    if form.mass < 1:
        attends = attends & (part.cumsum(2) - part < form.mass * scores.sum(2, keepdim=True))
    attends[..., 0] = True
    keys, values = held.keys, held.values
    logits = held.logits
    if form.attended_bits == 8:
        keys, values = (quantize(x.transpose(1, 2), 8, True).transpose(1, 2) for x in (keys, values))
        logits = dot(case.query, keys) * case.scale
    logits = logits.gather(3, chosen[:, :, None].expand(-1, -1, logits.shape[2], -1))
    weights = logits.masked_fill(~attends[:, :, None], -torch.inf).softmax(-1)  # [P, Hkv, G, K]
    rows = values[torch.arange(values.shape[0])[None, :, None], chosen]  # [P, Hkv, K, D]
    output = weights @ rows
    if form.tail != "none":
        seen = (part * attends).sum(2)[..., None, None]  # [P, Hkv, 1, 1]
        output = output * seen
        if form.tail == "mean":
            total = values.cumsum(1)[:, held.lengths - 1].transpose(0, 1)  # [P, Hkv, D]
            rest = total - (rows * attends[..., None]).sum(2)
            left = (held.lengths[:, None, None] - attends.sum(2, keepdim=True)).clamp_min(1)
            output = output + (1 - seen) * (rest / left)[:, :, None]
    error = ((output - case.full).norm(dim=-1) / case.full.norm(dim=-1)).mean()
    attended = attends.sum(2).float().mean(1)
    return Outcome(
        error=float(error),
        attended=float(attended.mean()),
        channels=float(plan.channels.float().mean()),
        read_tokens=read_tokens(form, held, plan, attended),
        held=held.prompt_tokens,
    )


@torch.inference_mode()
def capture(name: str, text: Path, num_tokens: int, num_layers: int, cache: Path) -> list[Trace]:
    """What evenly spread layers are given on `num_tokens` tokens from the middle of a text, kept in `cache`.

    Raises:
        InputError: the text is too short, or the model cannot be loaded or has too few layers.
    """
    file = cache / f"{Path(name).name}-{text.stem}-{num_tokens}-{num_layers}.pt"
    if file.is_file():
        return [Trace(*layer) for layer in torch.load(file)]
    from transformers import AttentionInterface

    model, tokenizer = load(name, "float32")
    token_ids = tokenizer(text.read_text(), add_special_tokens=False, verbose=False).input_ids
    start = (len(token_ids) - num_tokens) // 2
    if start < 0:
        raise InputError(f"{text} has {len(token_ids)} tokens, not {num_tokens}; give a longer text.")
    depth = model.config.num_hidden_layers
    if num_layers > depth:
        raise InputError(f"--layers {num_layers} is more than the {depth} of {name}; give fewer.")
    wanted = {round(x) for x in torch.linspace(0, depth - 1, num_layers).tolist()}
    traces: list[Trace] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        if module.layer_idx in wanted:
            traces.append(Trace(*(x[0].bfloat16() for x in (query, key, value))))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("forms", attend)
    model.set_attn_implementation("forms")
    model.get_decoder()(torch.tensor([token_ids[start : start + num_tokens]]), use_cache=False)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save([tuple(layer) for layer in traces], file)
    return traces


@dataclass
class Study:
    """Outcomes by text, length, layer, budget and form."""

    lengths: list[int]
    budgets: list[int]
    texts: list[str]
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, text: str, length: int, layer: int, budget: int, form: str, outcome: Outcome | None) -> None:
        """Note an outcome; None is noted as an error of NaN."""
        outcome = outcome or Outcome(math.nan, math.nan, math.nan, math.nan, 0)
        place = {"text": text, "length": length, "layer": layer, "budget": budget, "form": form}
        self.records.append({**place, **outcome._asdict()})

    def mean(self, name: str, form: str, **places: Any) -> float:
        """Mean of a figure over the records of a form at these places."""
        found = [x[name] for x in self.records if x["form"] == form and all(x[k] == v for k, v in places.items())]
        return statistics.fmean(found) if found else math.nan

    def above_oracle(self, form: str, budget: int) -> list[float]:
        """The form's error above the oracle's over the published method's, for each text and length."""
        ratios = []
        for text, length in product(self.texts, self.lengths):
            errors = [
                self.mean("error", x, text=text, length=length, budget=budget) for x in (form, "oracle", "published")
            ]
            ratios.append((errors[0] - errors[1]) / (errors[2] - errors[1]))
        return ratios

    def table(self, forms: Sequence[str]) -> Iterator[str]:
        """A Markdown table."""
        yield "| form | " + " | ".join(f"t = {budget}" for budget in self.budgets) + " |"
        yield "|---|" + "---|" * len(self.budgets)
        for form in forms:
            cells = []
            for budget in self.budgets:
                ratios = self.above_oracle(form, budget)
                error, read, attended = (
                    self.mean(name, form, budget=budget) for name in ("error", "read_tokens", "attended")
                )
                cells.append(
                    f"{error:.2%}; {statistics.fmean(ratios):.2f}, {max(ratios):.2f}; {read:.0f}, {attended:.0f}"
                )
            yield f"| {form} | " + " | ".join(cells) + " |"


def fit_size(study: Study, bits: int) -> Iterator[str]:
    """Fit stage 1's size for low-bit keys of so many bits to the axis "size", and say how it does elsewhere."""
    places = list(product(study.texts, study.lengths, study.budgets))
    curves: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for text, length, budget in places:
        points = {}
        for held in SIZES:
            form = f"{bits} bits, held={held:g}"
            where = {"text": text, "length": length, "budget": budget}
            error = study.mean("error", form, **where)
            if not math.isnan(error):
                points[study.mean("held", form, **where)] = error
        curves[text, length, budget] = sorted(points.items())

    def error_at(place: tuple[str, int, int], count: float) -> float:
        """The error at this size, between the sizes that were measured."""
        points = curves[place]
        count = min(max(count, points[0][0]), points[-1][0])
        for (x, y), (z, w) in pairwise(points):
            if x <= count <= z:
                part = math.log(count / x) / math.log(z / x)
                return y + part * (w - y)
        return points[-1][1]

    def loss(places: Sequence[tuple[str, int, int]], size: Callable[[int, int], float]) -> float:
        """Mean of the error over the least error of any size."""
        return statistics.fmean(error_at(x, size(x[1], x[2])) / min(y for _, y in curves[x]) for x in places) - 1

    train = [x for x in places if x[0] == study.texts[0] and x[1] != max(study.lengths)] or places
    rest = [x for x in places if x not in train]
    shapes = [(a / 8, b / 20) for a in range(2, 65) for b in range(21)]
    factor, power = min(shapes, key=lambda x: loss(train, lambda s, t: x[0] * t ** x[1] * s ** (1 - x[1])))
    yield f"Best sizes for {bits} bits, by text: error at it, and at the paper's size."
    yield ""
    yield "| length | " + " | ".join(f"t = {budget}" for budget in study.budgets) + " |"
    yield "|---|" + "---|" * len(study.budgets)
    for text, length in product(study.texts, study.lengths):
        cells = []
        for budget in study.budgets:
            count, error = min(curves[text, length, budget], key=lambda x: x[1])
            paper = held_tokens(length, budget)
            cells.append(f"{count:.0f}: {error:.2%}; {paper}: {error_at((text, length, budget), paper):.2%}")
        yield f"| {text}, {length:,} | " + " | ".join(cells) + " |"
    yield ""
    formulas: dict[str, Callable[[int, int], float]] = {
        "the paper's": held_tokens,
        f"{factor:g} t^{power:g} S^{1 - power:g}": lambda s, t: factor * t**power * s ** (1 - power),
    }
    for name, size in formulas.items():
        yield f"N = {name}: {loss(train, size):.1%} above the best size's error where fitted" + (
            f", {loss(rest, size):.1%} elsewhere" if rest else ""
        )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compares forms of low-bit keys by the error of attention's output.")
    parser.add_argument("texts", type=Path, nargs="+", help="files with texts")
    parser.add_argument("--model", default="smollm2", help="as for rocketkv")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 7424], help="tokens of the prefixes")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512], help="tokens")
    parser.add_argument("--layers", type=int, default=8, help="how many layers, evenly spread")
    parser.add_argument("--steps", type=int, default=24, help=f"how many of the {NEW_TOKENS} steps after a prefix")
    parser.add_argument("--axes", nargs="+", choices=AXES, metavar="AXIS", default=list(AXES), help=", ".join(AXES))
    parser.add_argument("--cache", type=Path, default=Path("build/forms"), metavar="FOLDER", help="for the traces")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to a file")
    arguments = parser.parse_args()
    for text in arguments.texts:
        if not text.is_file():
            parser.error(f"there is no file {text}.")
    if min(arguments.lengths) <= WINDOW or min(arguments.budgets) < WINDOW or arguments.layers < 1:
        parser.error(f"--lengths must be more than {WINDOW}, --budgets {WINDOW} or more, --layers 1 or more.")
    if not 2 <= arguments.steps <= NEW_TOKENS:
        parser.error(f"--steps {arguments.steps} is not from 2 to {NEW_TOKENS}.")
    return arguments


@torch.inference_mode()
def run(arguments: argparse.Namespace, console: Console) -> Study:
    """Measure every form everywhere.

    Raises:
        InputError: a text is too short, or the model cannot be loaded.
    """
    forms = {**REFERENCES, **{name: form for axis in arguments.axes for name, form in AXES[axis].items()}}
    num_tokens = max(arguments.lengths) + NEW_TOKENS
    traces = {
        text: capture(arguments.model, text, num_tokens, arguments.layers, arguments.cache)
        for text in track(arguments.texts, "reading", console=console)
    }
    study = Study(arguments.lengths, arguments.budgets, [text.stem for text in arguments.texts])
    places = [(text, layer, length) for text in traces for layer in range(arguments.layers) for length in study.lengths]
    for text, layer, length in track(places, "choosing", console=console):
        case = Case(traces[text][layer], length, arguments.steps)
        for budget, (name, form) in product(study.budgets, forms.items()):
            study.add(text.stem, length, layer, budget, name, measure(form, case, budget))
    return study


def main() -> None:
    """Measure and show."""
    arguments = parse_arguments()
    console = Console(stderr=True)
    try:
        study = run(arguments, console)
    except RocketKVError as error:
        sys.exit(f"error: {error}")
    if arguments.json is not None:
        forms = {**REFERENCES, **{name: form for axis in arguments.axes for name, form in AXES[axis].items()}}
        described = {name: asdict(form) for name, form in forms.items()}
        arguments.json.write_text(json.dumps({"forms": described, "records": study.records}))
    print("Cells: error; above the oracle, mean and worst; tokens' worth read, tokens attended to.")
    for axis in ("references", *arguments.axes):
        names = list(REFERENCES if axis == "references" else AXES[axis])
        print(f"\n## {axis}\n", *study.table(names), sep="\n")
    if "size" in arguments.axes:
        for bits in (4, 3, 2):
            print("", *fit_size(study, bits), sep="\n")


if __name__ == "__main__":
    main()
