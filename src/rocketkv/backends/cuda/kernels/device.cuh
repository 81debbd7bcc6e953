// What only a GPU has: conversions in PTX, launches that overlap, and clusters. The tests compile everything but this
// file for a CPU, where tests/backends/cuda/emulator.h defines the same names.
#pragma once

extern __shared__ uint4 dynamic_shared[];  // memory of a block, as many bytes as its launch says

__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ __forceinline__ unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ unsigned short float_to_bfloat16(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Launches overlap by programmatic dependent launch. A kernel that may start early begins once all blocks of the one
// before it have called `let_next_start` or ended; its own threads may do no more before `wait_for_previous` than clear
// shared memory. Every thread waits there until the kernel before has ended and all that it wrote can be seen. So no
// kernel of a step ends before those earlier in the step have, and none reads or writes memory while an earlier one
// still does; the first kernel of a step starts in the ordinary way, after all that came before it on the stream.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From compute capability 9.0 on, blocks of a cluster run at the same time and read each other's shared memory. Below,
// a block is a cluster of its own.

// Wait for all threads of the cluster, after which what they wrote to shared memory can be read.
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The number that block `rank` of the cluster has where this block has `own`.
__device__ __forceinline__ float of_block(const float* own, int rank) {
#if __CUDA_ARCH__ >= 900
  unsigned there;
  float x;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(own))), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  return x;
#else
  return *own;
#endif
}
