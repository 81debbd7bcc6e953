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

    def __init__(self, work: Callable[[], Tensor], device: torch.device) -> None:
        """Record `work`, all of it on `device`, and run it once."""
        self._graph, self._device = torch.cuda.CUDAGraph(), device
        with torch.cuda.device(device), torch.cuda.graph(self._graph):
            self.output = work()
        self.replay()

    def replay(self) -> None:
        """Run the work again."""
        with torch.cuda.device(self._device):
            self._graph.replay()


# What records, by the kind of device; each takes a function, records its work on a device and runs it once.
RECORDERS: dict[str, Callable[[Callable[[], Tensor], torch.device], Recording]] = {"cuda": CudaRecording}
