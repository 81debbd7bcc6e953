"""The emulator finds what a CPU's order of threads would hide: it does run threads in any order, up to a barrier.

It also finds blocks of a cluster that do not wait for each other, and a kernel that starts early and does not wait for
the one before.
"""

import ctypes

import pytest

from backends.cuda.emulator import Emulator
from rocketkv.backends.cuda.launch import Shape

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
# Threads tell whether they had their argument before they waited. The careless ones of the second block do not wait.
EARLY = """
struct Numbers { int* out; };
extern "C" void early(const Numbers __grid_constant__ numbers) {
  if (IS_CARELESS && blockIdx.x == 1) return;
  __shared__ const int* before[32];
  before[threadIdx.x] = numbers.out;
  wait_for_previous();
  numbers.out[threadIdx.x] = before[threadIdx.x] == numbers.out;
}
"""
# Each block reads from the shared memory of the other block of its cluster.
SWAP = """
struct Numbers { int* out; };
extern "C" void swap(const Numbers numbers) {
  __shared__ float own[32];
  own[threadIdx.x] = blockIdx.y;
  BEFORE;
  numbers.out[blockIdx.y * 32 + threadIdx.x] = of_block(&own[threadIdx.x], 1 - blockIdx.y % 2);
  AFTER;
}
"""
RIGHT = [(i + 1) % 64 + 1000 * (i ^ 1) for i in range(64)]


class Numbers(ctypes.Structure):
    _fields_ = (("out", ctypes.c_void_p),)


def shifted(barrier: str, seed: int) -> list[int]:
    out = (ctypes.c_int * 64)()
    kernel = Emulator(seed).kernel(SHIFT.replace("BARRIER", barrier), "shift", "Numbers", Numbers)
    kernel(Numbers(ctypes.addressof(out)), Shape((1, 1, 1), 64))
    return list(out)


@pytest.mark.parametrize("barrier", ["__syncthreads()", "__syncwarp()", ""])
def test_a_missing_barrier_shows(barrier: str) -> None:
    results = [shifted(barrier, seed) for seed in range(10)]
    assert (results == 10 * [RIGHT]) == (barrier == "__syncthreads()")


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_missing_wait_for_the_kernel_before_shows(overlaps: bool) -> None:
    out = (ctypes.c_int * 32)()
    numbers, shape = Numbers(ctypes.addressof(out)), Shape((2, 1, 1), 32, overlaps=overlaps)
    kernels = [Emulator().kernel(EARLY.replace("IS_CARELESS", word), "early", "Numbers", Numbers) for word in "01"]
    kernels[0](numbers, shape)
    assert list(out) == 32 * [not overlaps]
    if overlaps:
        with pytest.raises(RuntimeError, match="a thread ends that has not waited"):
            kernels[1](numbers, shape)
    else:
        kernels[1](numbers, shape)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("wait_for_cluster()", "wait_for_cluster()"),
        ("__syncthreads()", "wait_for_cluster()"),
        ("wait_for_cluster()", ""),
    ],
)
def test_a_missing_barrier_of_a_cluster_shows(before: str, after: str) -> None:
    out = (ctypes.c_int * 128)()
    source = SWAP.replace("BEFORE", before).replace("AFTER", after)
    kernel = Emulator().kernel(source, "swap", "Numbers", Numbers)
    kernel(Numbers(ctypes.addressof(out)), Shape((1, 4, 1), 32, cluster=2))
    assert (list(out[::32]) == [1, 0, 3, 2]) == (before == after)
