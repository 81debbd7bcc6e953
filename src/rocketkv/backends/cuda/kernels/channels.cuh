// The choice of the channels along which a head's tokens are scored. See largest_channels in ops/channels.py.
#pragma once

#include "layer.cuh"
#include "reduce.cuh"

struct Channels {
  alignas(16) unsigned orders[D];  // the size of each channel, as `ordered`
  int chosen[D];                   // the channels that are read, the largest first
  float temperatures[G];           // the factor on each query head's dot products, for page bounds
};

// Choose the `count` channels with the largest |q|, summed over the query heads and times the spread if there is one;
// of equal ones the lower. All threads of a block call this; `queries` is [G][D].
__device__ __forceinline__ void choose_channels(const T* queries, const float* spread, int count, Channels& channels) {
  for (int c = threadIdx.x; c < D; c += blockDim.x) {
    float size = 0.0f;
    for (int g = 0; g < G; ++g) size += fabsf(to_float(queries[g * D + c]));
    if (spread) size *= spread[c];
    channels.orders[c] = ordered(size);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < D; c += blockDim.x) {
    const unsigned own = channels.orders[c];
    int rank = 0;
#pragma unroll 8
    for (int other = 0; other < D; ++other) {
      const unsigned order = channels.orders[other];
      rank += order > own || (order == own && other < c);
    }
    if (rank < count) channels.chosen[rank] = c;
  }
  __syncthreads();
}

// Set SparQ's temperatures. See hybrid_logits in ops/pages.py.
__device__ __forceinline__ void set_temperatures(const T* queries, const float* spread, int count, float scale,
                                                 Channels& channels) {
  const int lane = threadIdx.x % WARP;
  for (int g = threadIdx.x / WARP; g < G; g += blockDim.x / WARP) {
    auto size_of = [&](int c) { return fabsf(to_float(queries[g * D + c])) * (spread ? spread[c] : 1.0f); };
    float all = 0.0f, read = 0.0f;
    for (int c = lane; c < D; c += WARP) all += size_of(c);
    for (int r = lane; r < count; r += WARP) read += size_of(channels.chosen[r]);
    const float share = sum_lanes(read) / sum_lanes(all);  // 0 or NaN where all sizes are zero, or one of them is NaN
    if (lane == 0) channels.temperatures[g] = scale / sqrtf(share > 0.0f ? share : 1.0f);
  }
  __syncthreads();
}
