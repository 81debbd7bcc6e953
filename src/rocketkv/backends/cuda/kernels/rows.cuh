// How a warp reads rows of D numbers: several lanes share a row, and each lane has the same channels of every row.
#pragma once

#include "int8.cuh"
#include "reduce.cuh"

#if INT8
using Stored = signed char;
#else
using Stored = T;
#endif

__device__ constexpr int in_vector() {  // numbers that a lane loads at once: at most 16 bytes of T, and a divisor of D
  int count = 16 / sizeof(T);
  while (D % count) count /= 2;
  return count;
}

__device__ constexpr int lanes_for(int vectors) {
  int lanes = 1;
  while (lanes < vectors && lanes < WARP) lanes *= 2;
  return lanes;
}

constexpr int VECTOR = in_vector();
constexpr int ROW_LANES = lanes_for(D / VECTOR);                   // lanes that share a row
constexpr int ROWS = WARP / ROW_LANES;                             // rows that a warp reads at once
constexpr int VECTORS = (D / VECTOR + ROW_LANES - 1) / ROW_LANES;  // vectors of a row that a lane has
constexpr int NUMBERS = VECTORS * VECTOR;                          // numbers of a row that a lane has

// The channel of a lane's number `i` of a row; D or more where the lane has fewer numbers.
__device__ __forceinline__ int channel_of(int lane, int i) {
  return (i / VECTOR * ROW_LANES + lane % ROW_LANES) * VECTOR + i % VECTOR;
}

// A lane's numbers of a row as they are stored, so that many rows on their way take few registers.
template <class N>
struct Row {
  Packed<N, VECTOR> vectors[VECTORS];
  float steps[VECTORS];  // of codes

  // Load the row at `slot`; zeros if `is_there` is false. Codes have exponents from `first_step` of their slot's on.
  __device__ __forceinline__ void load(const void* rows, const signed char* exponents, int first_step, int64 slot,
                                       bool is_there, int lane) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int channel = channel_of(lane, v * VECTOR);
      vectors[v].clear();
      steps[v] = 0.0f;
      if (!is_there || channel >= D) continue;
      vectors[v].load(static_cast<const N*>(rows) + slot * D + channel);
      if (is_same<N, signed char>)
        steps[v] = step_of(exponents[slot * (2 * NUM_STEPS) + first_step + channel / STEP_CHANNELS]);
    }
  }

  __device__ __forceinline__ void unpack(float (&out)[NUMBERS]) const {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      vectors[v].unpack(out + v * VECTOR);
      if (is_same<N, signed char>)
        for (int i = 0; i < VECTOR; ++i) out[v * VECTOR + i] *= steps[v];
    }
  }
};

// Load a lane's numbers of the queries of HEADS heads from `first` on; zeros beyond the last head.
__device__ __forceinline__ void load_queries(const T* queries, int first, int lane, float (&out)[HEADS][NUMBERS]) {
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    Row<T> row;
    row.load(queries, nullptr, 0, first + h, first + h < G, lane);
    row.unpack(out[h]);
  }
}

// The dot product of two rows, the same in all lanes of the row.
__device__ __forceinline__ float dot(const float (&a)[NUMBERS], const float (&b)[NUMBERS]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < NUMBERS; ++i) sum += a[i] * b[i];
  return sum_lanes<ROW_LANES>(sum);
}
