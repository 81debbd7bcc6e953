"""The emulator finds what a CPU's order of threads would hide: it does run threads in any order, up to a barrier."""

import ctypes

import pytest

from backends.cuda.emulator import Emulator

# Each thread writes to shared memory and reads what its neighbour wrote, with or without a barrier between.
SHIFT = """
struct Numbers { int* out; };
extern "C" void shift(const Numbers numbers) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  BARRIER;
  const int own = 1000 * threadIdx.x;
  numbers.out[threadIdx.x] = shared[(threadIdx.x + 1) % 64] + __shfl_xor_sync(~0u, own, 1);
}
"""
RIGHT = [(i + 1) % 64 + 1000 * (i ^ 1) for i in range(64)]


class Numbers(ctypes.Structure):
    _fields_ = (("out", ctypes.c_void_p),)


def shifted(barrier: str, seed: int) -> list[int]:
    out = (ctypes.c_int * 64)()
    kernel = Emulator(seed).kernel(SHIFT.replace("BARRIER", barrier), "shift", "Numbers", Numbers)
    kernel(Numbers(ctypes.addressof(out)), (1, 1, 1), 64, 0)
    return list(out)


@pytest.mark.parametrize("barrier", ["__syncthreads()", "__syncwarp()", ""])
def test_a_missing_barrier_shows(barrier: str) -> None:
    results = [shifted(barrier, seed) for seed in range(10)]
    assert (results == 10 * [RIGHT]) == (barrier == "__syncthreads()")
