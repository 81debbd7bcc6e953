"""A device for the CUDA kernels that is a CPU: g++ compiles their source behind emulator.h, and fibers are the threads.

The libraries stay in build/emulator, by what they were compiled from.
"""

import ctypes
import os
import shutil
import subprocess
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from rocketkv.backends.base import LayerTensors
from rocketkv.backends.cuda.arguments import Layer
from rocketkv.backends.cuda.launch import Kernel, Program, Shape
from rocketkv.backends.cuda.step import CudaStep

if shutil.which("g++") is None:
    pytest.skip("there is no g++ to compile the kernels for the CPU", allow_module_level=True)

HERE = Path(__file__).parent
CACHE = HERE.parents[2] / "build" / "emulator"
SHARED_BYTES = 48 * 1024  # of a block on any GPU, without asking for more
# -O0 compiles fast, and these rows are short. A GPU's own rounding of products that are added is not emulated.
OPTIONS = ["-std=c++17", "-O0", "-shared", "-fPIC", "-ffp-contract=off", "-w", f"-I{HERE}", "-xc++", "-"]
if "ROCKETKV_TEST_KERNELS" in os.environ:  # `make sanitize`; the stacks of fibers confuse AddressSanitizer
    OPTIONS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--param", "asan-stack=0"]
CALL = """
extern char __start_shared_memory, __stop_shared_memory;
extern "C" void call(const void* argument) { KERNEL(*static_cast<const ARGUMENT*>(argument)); }
extern "C" void* memory(bool is_end) { return is_end ? &__stop_shared_memory : &__start_shared_memory; }
extern "C" int argument_bytes() { return sizeof(ARGUMENT); }
"""


class Emulator:
    """A device of few cores, so that short rows have several pieces; its threads run in an order drawn by `seed`.

    A kernel's start is in order all the same: that a kernel waits for the one before shows by other means (emulator.h).
    """

    num_cores = 4
    overlaps = True
    most_cluster = 2

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def load(self, program: Program) -> Kernel:
        """Compile a kernel for the CPU, unless an earlier run did."""
        return self.kernel(program.source(), program.kernel, "Layer", Layer)

    def kernel(self, source: str, name: str, argument: str, structure: type[ctypes.Structure]) -> Kernel:
        """Compile the kernel `name`, whose argument is the struct `argument`, in Python `structure`.

        The kernel raises RuntimeError if its threads wait for each other in vain, or if they should have waited.
        """
        call = CALL.replace("KERNEL", name).replace("ARGUMENT", argument)
        library = compiled(f'#include "emulator.h"\n{source}{call}')
        assert library.argument_bytes() == ctypes.sizeof(structure)
        library.memory.restype = ctypes.c_void_p
        start, end = library.memory(False), library.memory(True)

        def run(layer: ctypes.Structure, shape: Shape) -> None:
            assert end - start + shape.shared_bytes <= SHARED_BYTES
            self.seed += 1
            numbers = (*shape.grid, shape.threads, shape.shared_bytes, shape.cluster, shape.overlaps, self.seed)
            size, memory = ctypes.sizeof(structure), (ctypes.c_void_p(start), ctypes.c_void_p(end))
            launch = (ctypes.c_uint * len(numbers))(*numbers)  # `Launch` in emulator.cpp
            failure = fibers().launch(library.call, ctypes.byref(layer), size, launch, *memory)
            if failure is not None:
                raise RuntimeError(failure.decode())

        return run


class Emulated:
    """The CUDA backend on that device, as far as `check_steps` needs a backend."""

    @staticmethod
    def bind(layer: LayerTensors, seed: int = 0) -> CudaStep:
        """Return a step whose scratch memory is no number."""
        step = CudaStep(layer, Emulator(seed))
        for name, memory in step.scratch.items():
            if memory is not None and name != "pieces_done":
                memory.view(torch.uint8).fill_(255)
        return step


@cache
def fibers() -> ctypes.CDLL:
    """Return the library of emulator.cpp, whose names the kernels find."""
    library = ctypes.CDLL(built((HERE / "emulator.cpp").read_text()), mode=ctypes.RTLD_GLOBAL)
    library.launch.restype = ctypes.c_char_p
    return library


@cache
def compiled(source: str) -> ctypes.CDLL:
    """Return a library compiled from this source."""
    fibers()
    return ctypes.CDLL(built(source))


def built(source: str) -> str:
    """Return the file compiled from this source, by this run or an earlier one."""
    digest = sha256("\0".join((source, (HERE / "emulator.h").read_text(), *OPTIONS)).encode()).hexdigest()
    path = CACHE / f"{digest[:24]}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=CACHE) as folder:
            new = f"{folder}/new.so"
            done = subprocess.run(["g++", *OPTIONS, "-o", new], input=source, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr
            os.replace(new, path)
    return str(path)
