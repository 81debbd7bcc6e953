"""Decode steps of layers timed as a GPU decodes, by replays of a CUDA graph; on a CPU they run as they are."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rocketkv.attention import LayerCache
from rocketkv.backends import Step
from rocketkv.bench.timing import timed
from rocketkv.hf.recording import RECORDERS, Recording
from rocketkv.replay import bound_step, count_step


class Replayed:
    """A call that does the same work each time and returns the milliseconds that the work takes.

    Args:
        work: the work, which takes one decode step in each of the caches; all else that it does must be the same for
            the host each time.
        caches: the caches.
        device: `cpu` runs the work itself; `cuda` runs it twice, to compile and to capture it, and then replays it.
    """

    def __init__(self, work: Callable[[], Tensor], caches: Sequence[LayerCache], device: str) -> None:
        self._work, self._caches, self._device = work, caches, device
        self._recording: Recording | None = None
        self._steps: list[Step | None] = []

    def __call__(self) -> float:
        """Do the work, and return the milliseconds."""
        if self._device not in RECORDERS:
            return timed(self._work, self._device)
        if self._recording is None or None in self._steps or self._bound_steps() != self._steps:
            self._recording = None  # its memory is free for the next one
            self._work()  # this compiles kernels, and prepares what a layer must prepare
            self._steps = self._bound_steps()
            self._recording = RECORDERS[self._device](self._work, torch.device(self._device))
        milliseconds = timed(self._recording.replay, self._device)
        for cache in self._caches:
            count_step(cache)
        return milliseconds

    def _bound_steps(self) -> list[Step | None]:
        return [bound_step(cache) for cache in self._caches]
