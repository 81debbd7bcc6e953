"""The scores that a form gives to tokens."""

import math

import torch
from torch import Tensor

from rocketkv.index import PageIndex
from rocketkv.ops import score_tokens
from studies.lowbit_forms.channels import pick_channels, spread_of
from studies.lowbit_forms.forms import Form
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


def lowbit(form: Form, case: Case, held: Held, plan: Plan) -> Tensor:
    """Approximate logits `[P, Hkv, G, M]` by low-bit keys, the last group's by its 16-bit keys."""
    query, keys = case.query, held.keys
    window = case.window.reshape(keys.shape[0], -1, WINDOW, keys.shape[2]).permute(2, 0, 1, 3)
    if form.rotated:
        query, keys, window = (x @ hadamard(keys.shape[2]) for x in (query, keys, window))
    spread = spread_of(form, keys, held.lengths)
    read = query * pick_channels(form, query, window, spread, plan.channels)
    if form.centred:
        keys = keys - keys[:, : held.prompt_tokens].mean(1, keepdim=True).bfloat16().float()
    logits = dot(read, keys)
    if form.bits < 16:
        whole = keys.shape[1] // form.group * form.group
        groups = keys[:, :whole].reshape(keys.shape[0], -1, form.group, keys.shape[2])
        coded = dot(read, quantize(groups, form.bits, form.symmetric).flatten(1, 2))
        is_whole = torch.arange(whole) < (held.lengths // form.group * form.group)[:, None]  # [P, whole]
        logits[..., :whole] = coded.where(is_whole[:, None, None], logits[..., :whole])
    return logits * case.scale


def page_logits(form: Form, case: Case, held: Held, plan: Plan) -> Tensor:
    """The logits `[P, Hkv, G, M]` by page bounds, each step a row of a batch."""
    keys = held.keys.bfloat16().expand(len(held.lengths), -1, -1, -1).contiguous()
    lengths = held.lengths[:, None].repeat(1, keys.shape[1])
    index = PageIndex(keys, lengths, plan.page_size, weighted=form.spread != "none")
    return index.logits(
        case.query, lengths=lengths, num_tokens=keys.shape[2], num_channels=plan.channels, scale=case.scale
    )


def score(form: Form, case: Case, held: Held, plan: Plan) -> Tensor:
    """Score each token for each step, `[P, Hkv, M]`, 0 beyond the step's length."""
    if form.scoring == "exact":
        logits = held.logits
    else:
        logits = (page_logits if form.scoring == "pages" else lowbit)(form, case, held, plan)
    if form.heads == "max":
        beyond = torch.arange(logits.shape[3]) >= held.lengths[:, None]
        scores = logits.masked_fill(beyond[:, None, None], -torch.inf).softmax(-1).amax(2)
    else:
        scores = score_tokens(logits, held.lengths[:, None].expand(-1, held.keys.shape[0]))
    if form.by_value:
        scores = scores * held.values.norm(dim=-1)
    return scores
