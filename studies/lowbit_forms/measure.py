"""The error of a form's attention on the steps of a case."""

from typing import NamedTuple

import torch

from rocketkv.ops import choose_tokens
from studies.lowbit_forms.forms import Form
from studies.lowbit_forms.score import quantize, score
from studies.lowbit_forms.spending import keep_count, make_plan, read_tokens
from studies.lowbit_forms.traces import Case, dot


class Outcome(NamedTuple):
    """The result of a form, as means over steps."""

    error: float
    attended: float
    channels: float
    read_tokens: float  # tokens with keys and values of the same bytes, for scoring and attention
    held: int


def measure(form: Form, case: Case, budget: int) -> Outcome | None:
    """Run all steps of a case and return the outcome; None if the form cannot score within its budget."""
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
