"""The spending of a step's bytes, and the count of the bytes that a form reads."""

import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from rocketkv.paper import kept_tokens, split_selection
from studies.lowbit_forms.forms import PAGE, PAGE_CHANNELS, Form
from studies.lowbit_forms.traces import WINDOW, Held


class Plan(NamedTuple):
    """What each of the P steps reads, each field `[P]` int64."""

    page_size: Tensor
    channels: Tensor
    top_k: Tensor


def keep_count(form: Form, length: int, budget: int) -> int:
    """Return the number of tokens of the prefix that stage 1 keeps."""
    if form.size is not None:
        factor, power, rest = form.size
        count = factor * budget**power * length**rest
    else:
        count = form.held * kept_tokens(length, budget)
    return int(min(max(count, WINDOW), length))


def make_plan(form: Form, held: Held, budget: int) -> Plan | None:
    """Spend the budget for each step; return None if the form cannot score within the budget."""
    head_dim = held.keys.shape[2]
    splits = []
    for length in held.lengths.tolist():
        if form.scoring == "exact":
            splits.append((1, head_dim, budget))
        elif form.scoring == "pages":
            splits.append(split_selection(length, budget, head_dim))
        elif length <= budget:
            splits.append((1, head_dim, length))  # a short row is attended in full, without scores
        else:
            split = split_lowbit(form, length, budget, head_dim)
            if split is None:
                return None
            splits.append(split)
    return Plan(*torch.tensor(splits).unbind(1))


def split_lowbit(form: Form, length: int, budget: int, head_dim: int) -> tuple[int, int, int] | None:
    """Return page size (not used), channels and top_k for low-bit keys of so many tokens."""
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
    """Return the bytes of one channel of all tokens."""
    if form.bits == 16:
        return 2 * length
    tail = length % form.group
    return (length - tail) * (form.bits / 8 + (2 if form.symmetric else 4) / form.group) + 2 * tail


def token_bytes(form: Form, head_dim: int) -> int:
    """Return the bytes of a token attended to; with 8 bits its key and its value have one step each."""
    return 4 * head_dim if form.attended_bits == 16 else 2 * head_dim + 4


def read_tokens(form: Form, held: Held, plan: Plan, attended: Tensor) -> float:
    """Return the mean bytes of a step, in tokens with keys and values in 16 bits; `attended` is `[P]`."""
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
