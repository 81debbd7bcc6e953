"""Kernels, what they are compiled with, and what a launch needs of a device. The tests have a device that is a CPU."""

import re
from pathlib import Path
from typing import NamedTuple, Protocol

from rocketkv.backends.cuda.arguments import Layer

SOURCES = Path(__file__).parent / "kernels"


class Program(NamedTuple):
    """A kernel with its constants.

    Attributes:
        kernel: the name of the kernel and, with the suffix `.cu`, of its file.
        constants: the macros that the kernel is compiled with, each as name and value.
    """

    kernel: str
    constants: tuple[tuple[str, str | int], ...]

    def source(self) -> str:
        """Return the whole source: the constants, and the file with all that it includes, each once."""
        included: set[str] = set()

        def text_of(name: str) -> str:
            if name in included:
                return ""
            included.add(name)
            text = (SOURCES / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
            return re.sub(r'#include "(.+)"\n', lambda match: text_of(match[1]), text)

        constants = "".join(f"#define {name} {value}\n" for name, value in self.constants)
        return constants + text_of(f"{self.kernel}.cu")


class Shape(NamedTuple):
    """How a kernel is started.

    Attributes:
        grid: the number of blocks along x, y and z.
        threads: the threads of a block, whole warps.
        shared_bytes: the bytes of `dynamic_shared` of a block, 48 KiB less the kernel's own at most.
        overlaps: whether the kernel may start before the one before it on the stream has ended. All threads of such a
            kernel call `wait_for_previous` (device.cuh).
        cluster: the blocks along y of a cluster, which run at the same time and read each other's shared memory; a
            divisor of the grid's.
    """

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    overlaps: bool = False
    cluster: int = 1


class Kernel(Protocol):
    """A compiled kernel."""

    def __call__(self, layer: Layer, shape: Shape) -> None:
        """Start the kernel on the current stream, with a copy of `layer` as its argument."""
        ...


class Device(Protocol):
    """What runs kernels.

    Attributes:
        num_cores: the number of multiprocessors.
        overlaps: whether a kernel can start before the one before it has ended.
        most_cluster: the most blocks of a cluster, a power of two; 1 where there are no clusters.
    """

    num_cores: int
    overlaps: bool
    most_cluster: int

    def load(self, program: Program) -> Kernel:
        """Compile a kernel, unless that was done before."""
        ...


class Launch(NamedTuple):
    """A kernel and how it is started, which stay the same from token to token."""

    program: Program
    kernel: Kernel
    shape: Shape

    def __call__(self, layer: Layer) -> None:
        """Start the kernel for a token."""
        self.kernel(layer, self.shape)
