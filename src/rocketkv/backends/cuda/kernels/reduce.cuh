// Reductions and prefix sums over the lanes of a warp.
#pragma once

#include "numbers.cuh"

constexpr int WARP = 32;

// Add the numbers of WIDTH neighbouring lanes, a power of two. All of them get the same sum, added in the same order.
template <int WIDTH = WARP>
__device__ __forceinline__ float sum_lanes(float x) {
  for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

// The largest number of the lanes whose indices differ in the bits from FROM to below WIDTH; NaN is left out.
template <int WIDTH = WARP, int FROM = 1>
__device__ __forceinline__ float most_of_lanes(float x) {
  for (int step = WIDTH / 2; step >= FROM; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

__device__ __forceinline__ unsigned most_of_lanes(unsigned x) {
  for (int step = WARP / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

// The sum of a lane's number and those of all lanes before it.
__device__ __forceinline__ int sum_to_lane(int x, int lane) {
  for (int step = 1; step < WARP; step *= 2) {
    const int earlier = __shfl_up_sync(ALL, x, step);
    if (lane >= step) x += earlier;
  }
  return x;
}

// The largest less the least of all lanes' numbers, of which `is_there` says which count: 0 of no numbers, NaN with a
// NaN among them.
__device__ __forceinline__ float range_of_lanes(float low, float high, bool is_there) {
  const bool is_broken = is_there && (low != low || high != high);
  const float most = most_of_lanes(is_there ? high : -infinity());
  const float least = -most_of_lanes(is_there ? -low : -infinity());
  if (__ballot_sync(ALL, is_broken)) return not_a_number();
  const float range = most - least;
  return range < 0.0f ? 0.0f : range;
}
