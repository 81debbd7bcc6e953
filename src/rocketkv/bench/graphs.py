"""Decode steps of layers timed as a GPU decodes, by replays of a CUDA graph; on a CPU they run as they are."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rocketkv.attention import LayerCache
from rocketkv.backends import Step
from rocketkv.bench.timing import timed
from rocketkv.hf.recording import RECORDERS, Recording
from rocketkv.replay import bound_step, count_step

MOST_CAPTURES = 4  # the most captures in a row; after one, a layer may have no step left before it must prepare another


class Replayed:
    """A call that does the same work each time and returns the milliseconds that the work takes.

    A call raises a RuntimeError where a layer's step cannot be replayed, such as one of the reference.

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
        for _ in range(MOST_CAPTURES):
            if self._recording is not None and None not in self._steps and self._bound_steps() == self._steps:
                break
            self._recording = None  # its memory is free for the next one
            self._work()  # this compiles kernels, and prepares what a layer must prepare
            self._steps = self._bound_steps()
            if None not in self._steps:
                self._recording = RECORDERS[self._device](self._work, torch.device(self._device))
        else:
            raise RuntimeError("a layer has no step that a graph can replay; the backend may decline the cache.")
        milliseconds = timed(self._recording.replay, self._device)
        for cache in self._caches:
            count_step(cache)
        return milliseconds

    def _bound_steps(self) -> list[Step | None]:
        return [bound_step(cache) for cache in self._caches]
