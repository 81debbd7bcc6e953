"""Which channels a form reads, by the size of the queries and the spread of the keys."""

import torch
from torch import Tensor

from studies.lowbit_forms.forms import Form


def spread_of(form: Form, keys: Tensor, lengths: Tensor) -> Tensor:
    """The spread of each channel as a step finds it, `[P, Hkv, D]`: that of the groups full before its own token.

    Args:
        form: says which spread, and how large a group is.
        keys: `[Hkv, M, D]` float32, at least one group of them.
        lengths: `[P]` int64, tokens that each step has; a first group that is not full counts as full.
    """
    heads, num_tokens, head_dim = keys.shape
    num_groups = num_tokens // form.group
    groups = keys[:, : num_groups * form.group].double().reshape(heads, num_groups, form.group, head_dim)
    so_far = torch.arange(1, num_groups + 1)[:, None]
    high, low = groups.amax(2), groups.amin(2)
    if form.spread == "none":
        spread = torch.ones_like(high)
    elif form.spread == "step":
        spread = (high - low).cumsum(1) / so_far
    elif form.spread == "range":
        spread = high.cummax(1).values - low.cummin(1).values
    elif form.spread == "deviation":
        mean = groups.mean(2).cumsum(1) / so_far
        spread = (groups.square().mean(2).cumsum(1) / so_far - mean.square()).clamp_min(0).sqrt()
    elif form.spread == "within":
        spread = (groups.var(2, correction=0).cumsum(1) / so_far).sqrt()
    else:
        spread = groups.diff(dim=2).abs().mean(2).cumsum(1) / so_far
    last = ((lengths - 1) // form.group).clamp_min(1) - 1
    return spread[:, last].transpose(0, 1).float()


def pick_channels(form: Form, query: Tensor, window: Tensor, spread: Tensor, channels: Tensor) -> Tensor:
    """Mark the channels that each step reads.

    Args:
        form: says how the heads of a group agree.
        query: `[P, Hkv, G, D]` float32.
        window: `[W, Hkv, G, D]` float32, the prefix's last queries.
        spread: `[P, Hkv, D]` float32.
        channels: `[P]` int64, how many.

    Returns:
        `[P, Hkv, 1, D]` bool.
    """
    sizes = query.abs() * spread[:, :, None]  # [P, Hkv, G, D]
    if form.heads_of_channel == "unit q":
        sizes = sizes / query.norm(dim=3, keepdim=True)
    elif form.heads_of_channel == "unit":
        sizes = sizes / sizes.norm(dim=3, keepdim=True)
    elif form.heads_of_channel == "squares":
        sizes = sizes.square()
    elif form.heads_of_channel == "static":
        sizes = window.abs().mean((0, 2))[:, None] * spread[:, :, None]
    size = sizes.amax(2) if form.heads_of_channel == "max" else sizes.sum(2)
    rank = size.argsort(dim=2, descending=True, stable=True).argsort(2)
    return (rank < channels[:, None, None])[:, :, None]
