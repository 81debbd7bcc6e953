// CUDA on a CPU, as far as our kernels use it: each thread of a block is a fiber (emulator.cpp), so that __syncthreads,
// shuffles, ballots and atomics do what they do on a GPU. The kernels' own source is compiled behind this header.
#pragma once

#include <cmath>
#include <cstring>

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__ &
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("shared_memory")))

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern uint3 threadIdx, blockIdx, blockDim;
extern uint4* dynamic_shared;

// Wait for all threads of the block, which must be at the same line.
void wait_for_block(int line);

// Wait for all threads of the cluster; then read what another block of the cluster has in its shared memory.
void wait_for_blocks(int line);
float of_block(const float* own, int rank);
#define wait_for_cluster() wait_for_blocks(__LINE__)

// Of a kernel that may start before the one before it has ended, a thread has no argument before it waits.
inline void let_next_start() {}
void wait_for_previous();

// Hand over a number and return that of another lane of the warp, all of whose lanes must be at the same line.
unsigned exchange(unsigned number, int lane, int line);
unsigned vote(bool is_for, int line);

#define __syncthreads() wait_for_block(__LINE__)
#define __syncwarp() static_cast<void>(vote(true, __LINE__))
#define __ballot_sync(mask, is_for) vote(is_for, __LINE__)
#define __shfl_sync(mask, number, lane) exchange_as(number, lane, __LINE__)
#define __shfl_xor_sync(mask, number, step) exchange_as(number, (threadIdx.x % 32) ^ (step), __LINE__)
#define __shfl_up_sync(mask, number, step) exchange_as(number, static_cast<int>(threadIdx.x % 32) - (step), __LINE__)
#define __threadfence()

template <class N>
N exchange_as(N number, int lane, int line) {
  static_assert(sizeof(N) == 4);
  unsigned bits;
  std::memcpy(&bits, &number, 4);
  bits = exchange(bits, lane < 0 ? threadIdx.x % 32 : lane, line);
  std::memcpy(&number, &bits, 4);
  return number;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline float __expf(float x) { return std::exp(x); }
template <class N>
N __ldcg(const N* from) {
  return *from;
}
inline int atomicAdd(int* at, int number) {
  const int before = *at;
  *at += number;
  return before;
}

// What device.cuh has in PTX.
inline float half_to_float(unsigned short bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
inline unsigned short float_to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline unsigned short float_to_bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fffu;
}
