"""The spending of a step's bytes, and the count of the bytes that a form reads."""

import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from rocketkv.paper import kept_tokens, split_selection
from studies.lowbit_forms.forms import Form
from studies.lowbit_forms.traces import WINDOW, Held


class Plan(NamedTuple):
    """What each of the P steps reads, each field `[P]` int64."""

    page_size: Tensor
    channels: Tensor
    top_k: Tensor


def keep_count(form: Form, length: int, budget: int) -> int:
    """Tokens of the prefix that stage 1 keeps."""
    if form.held is None:
        return length
    return int(min(max(form.held * kept_tokens(length, budget), WINDOW), length))


def make_plan(form: Form, held: Held, budget: int) -> Plan | None:
    """Spend the budget for each step; return None if the form cannot score within the budget."""
    head_dim = held.keys.shape[2]
    splits: list[tuple[int, int, int]] = []
    for length in held.lengths.tolist():
        if form.scoring == "exact":
            splits.append((1, head_dim, budget))
        elif form.scoring == "pages":
            page_size, channels, top_k = split_selection(length, budget, head_dim)
            splits.append((page_size, channels, top_k - (form.spread != "none")))  # a spread takes a token's bytes
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
    fixed = fixed_bytes(form, length, head_dim)
    channels = min(int((form.share * total - fixed) / channel_bytes(form, length)), head_dim)
    top_k = int((total - fixed - channels * channel_bytes(form, length)) / (4 * head_dim))
    return (1, channels, top_k) if channels >= 1 and top_k >= 1 else None


def fixed_bytes(form: Form, length: int, head_dim: int) -> int:
    """Bytes that a step reads beside channels and tokens: spread, norms of values, and mean value with its weight."""
    return 4 * head_dim * ((form.spread != "none") + form.tail) + length * form.by_value


def channel_bytes(form: Form, length: int) -> float:
    """Return the bytes of one channel of all tokens."""
    if form.bits == 16:
        return 2 * length
    tail = length % form.group
    return (length - tail) * (form.bits / 8 + (2 if form.symmetric else 4) / form.group) + 2 * tail


def read_tokens(form: Form, held: Held, plan: Plan) -> float:
    """Mean bytes of a step, as tokens' worth of keys and values."""
    head_dim = held.keys.shape[2]
    read: list[float] = []
    for length, page_size, channels, top_k in zip(*(x.tolist() for x in (held.lengths, *plan)), strict=True):
        if form.scoring == "exact":
            scored = 2.0 * head_dim * length
        elif form.scoring == "pages":
            scored = 2.0 * channels * math.ceil(length / page_size) + 4 * head_dim * (form.spread != "none")
        elif top_k < length:
            scored = channels * channel_bytes(form, length) + fixed_bytes(form, length, head_dim)
        else:
            scored = 0.0
        read.append(scored / (4 * head_dim) + min(top_k, length))
    return statistics.mean(read)
