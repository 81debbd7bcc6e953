"""Work of a device that is recorded once and then runs again without the host: on a GPU, a CUDA graph."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Recording(Protocol):
    """The recorded work of a device, which can run again on the same memory.

    Attributes:
        output: what the recorded function returned; each run writes it anew.
    """

    output: Tensor

    def replay(self) -> None:
        """Run the work again."""


class CudaRecording:
    """A recording in a CUDA graph."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        """Record `work` and run it once."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.output = work()
        self._graph.replay()

    def replay(self) -> None:
        """Run the work again."""
        self._graph.replay()


# What records, by the kind of device; each takes a function, records its work and runs it once.
RECORDERS: dict[str, Callable[[Callable[[], Tensor]], Recording]] = {"cuda": CudaRecording}
