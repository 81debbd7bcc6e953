"""The scores that a form gives to tokens."""

import math

import torch
from torch import Tensor

from rocketkv.index import PageIndex
from rocketkv.ops import choose_tokens, hybrid_logits, score_tokens
from studies.lowbit_forms.forms import PAGE, PAGE_CHANNELS, Form
from studies.lowbit_forms.spending import Plan
from studies.lowbit_forms.traces import WINDOW, Case, Held, dot


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
    """Return an orthogonal matrix of entries of equal size; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(size)


def rotate(form: Form, case: Case, held: Held) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries `[P, Hkv, G, D]`, keys `[Hkv, M, D]` and the window's queries `[W, Hkv, G, D]` alike."""
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
    """Return logits `[P, Hkv, G, M]` by low-bit keys, those of the last group by its 16-bit keys."""
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
    """Return the published logits `[P, Hkv, G, M]`, computed one step at a time."""
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
    """Score each token for each step, `[P, Hkv, M]`, 0 beyond the step's length."""
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
