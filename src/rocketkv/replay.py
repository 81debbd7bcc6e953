"""What the host counts when a layer's decode step runs from a captured graph, without a call of `decode`.

A graph repeats the work of a device on the same memory. As long as a layer's bound step is the same object, that memory
is the layer's, and only numbers on the host have to follow.
"""

from typing import NamedTuple

from rocketkv.attention import LayerCache
from rocketkv.backends import Step
from rocketkv.exclusive import exclusive


class Counts(NamedTuple):
    """The numbers on the host that a decode step changes."""

    num_seen: int
    num_decoded: int
    just_prefilled: bool
    steps_left: int
    num_kept: int
    num_pending: int


def bound_step(layer: LayerCache) -> Step | None:
    """Return a backend's step that can run again as it is; None if a call of `decode` must prepare or trace the next.

    The reference's steps are never returned, because they wait for the device.
    """
    return None if layer.trace else layer._decoder.bound_step


def counts(layer: LayerCache) -> Counts:
    """Return the counts of a layer that has been prefilled."""
    working, plan = layer._prefilled()
    kept = working.max_length, working.num_pending
    return Counts(layer.num_seen, layer.num_decoded, layer.just_prefilled, plan.steps_left, *kept)


@exclusive
def count_step(layer: LayerCache) -> None:
    """Count one token per row, which the device appends."""
    _, plan = layer._prefilled()
    layer._decoder.count_step()
    plan.steps_left -= 1
    layer.num_seen += 1
    layer.num_decoded += 1
    layer.just_prefilled = False


def return_to(layer: LayerCache, before: Counts) -> None:
    """Go back to earlier counts after a step that broke off, whether or not the device has appended its token."""
    working, plan = layer._prefilled()
    layer._decoder.forget()
    layer.num_seen, layer.num_decoded, layer.just_prefilled, plan.steps_left = before[:4]
    working.take_back(before.num_kept, before.num_pending)
