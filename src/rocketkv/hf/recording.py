"""Work of a device that is recorded once and then runs again without the host: on a GPU, a CUDA graph."""

from collections.abc import Callable
from functools import cache
from threading import Lock
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
        """Record `work`, all of it on `device`, and run it once.

        Raises:
            RuntimeError: the work waits for the device, or does what else a graph cannot hold.
        """
        self._graph, self._device = torch.cuda.CUDAGraph(), device
        with torch.cuda.device(device):
            try:
                self.output = _capture(self._graph, work)
            except BaseException:
                # Some versions of torch leave the device's generator in the state of a capture, in which no random
                # number can be drawn. A capture that succeeds ends that state.
                _capture(torch.cuda.CUDAGraph(), lambda: torch.zeros(1, device="cuda"))
                raise
        self.replay()

    def replay(self) -> None:
        """Run the work again."""
        with torch.cuda.device(self._device):
            self._graph.replay()


_one_at_a_time = Lock()


@cache
def _stream(index: int) -> torch.cuda.Stream:
    """Return the stream of a device on which all its graphs are captured, so that they share cuBLAS's workspace."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def _capture(graph: torch.cuda.CUDAGraph, work: Callable[[], Tensor]) -> Tensor:
    """Capture the work on the current device, other threads' work apart; return what it returned.

    The current stream stays the current one, even where torch does not leave the stream of a capture that broke off.
    """
    capturing = torch.cuda.graph(graph, stream=_stream(torch.cuda.current_device()), capture_error_mode="thread_local")
    with _one_at_a_time, torch.cuda.stream(torch.cuda.current_stream()), capturing:
        return work()


# What records, by the kind of device; each takes a function, records its work on a device and runs it once.
RECORDERS: dict[str, Callable[[Callable[[], Tensor], torch.device], Recording]] = {"cuda": CudaRecording}
