"""Recurrent states: what linear attention, state-space models and short convolutions keep instead of tokens.

A state has all tokens of its row in it, and each forward pass overwrites it in place. So no earlier state can be told
from a later one: a cache with states goes on, is copied and reordered, but never goes back.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

_KINDS = ("conv_states", "recurrent_states")


def has_states(layer: object) -> bool:
    """Return whether a layer of a cache keeps states, be it beside its tokens."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def read_states(layer: object) -> dict[str, Tensor]:
    """Return the states of a layer, `[B, ...]` each, by name; none if the layer has none or has seen nothing."""
    if not has_states(layer):
        return {}
    found = {f"{kind}.{i}": state for kind in _KINDS for i, state in getattr(layer, kind).items()}
    return {name: state for name, state in found.items() if state is not None}


def is_state(name: str) -> bool:
    """Return whether the name of a tensor ends in one that `read_states` gives."""
    return name.split(".")[-2] in _KINDS if "." in name else False


def write_states(layer: Any, states: Mapping[str, Tensor]) -> None:
    """Give copies of the states that `read_states` returned to a layer that has seen nothing."""
    for name, state in states.items():
        kind, i = name.split(".")
        layer.lazy_initialization(**{kind: state, "state_idx": int(i)})
        getattr(layer, kind)[int(i)] = state.clone()
        layer.has_previous_state[int(i)] = True


def join_states(layers: Sequence[object]) -> dict[str, Tensor]:
    """Return the states of several layers as the rows of one batch."""
    parts = [read_states(layer) for layer in layers]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def state_bytes(layer: object) -> int:
    """Return the bytes of a layer's states."""
    return sum(state.nbytes for state in read_states(layer).values())
