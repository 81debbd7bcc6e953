// The k best of many numbers: where to cut, found by bisection, so that the cost hardly depends on the numbers.
#pragma once

#include "simd.h"

namespace rocketkv {

// Numbers that are not negative are in the order of their bits, and a NaN without its sign is above them all.
inline uint32_t order_bits(float x) { return load<uint32_t>(&x); }

using Lanes = int32_t __attribute__((vector_size(4 * kWidth)));

// How many of numbers[0 .. n) are above `bound`. Reads to the end of the last Vec.
inline int64_t count_above(const float* numbers, int64_t n, uint32_t bound) {
  Lanes bounds = static_cast<int32_t>(bound) - Lanes{}, count = {}, lane = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) count -= load<Lanes>(numbers + i) > bounds;
  if (i < n) {
    for (int j = 0; j < kWidth; ++j) lane[j] = j;
    count -= (load<Lanes>(numbers + i) > bounds) & (lane < static_cast<int32_t>(n - i));
  }
  return sum_lane(count);
}

// A number such that those from it on are `wanted`, or else the largest such that they are more; num_above(b) counts the
// numbers above b.
template <class NumAbove>
inline uint32_t find_cut(int64_t wanted, NumAbove num_above) {
  uint32_t cut = 0;
  for (uint32_t bit = 1u << 30; bit != 0; bit >>= 1) {
    const int64_t above = num_above((cut | bit) - 1);
    if (above >= wanted) cut |= bit;
    if (above == wanted) break;
  }
  return cut;
}

// Call f(i) for each i of [begin, end) whose number is not below the cut, in order. Reads to the end of the last Vec.
template <class F>
inline void for_each_from(uint32_t cut, const float* numbers, int64_t begin, int64_t end, F f) {
  const Lanes cuts = static_cast<int32_t>(cut) - Lanes{};
  for (int64_t start = begin; start < end; start += kWidth) {
    uint32_t lanes = lanes_that_hold(load<Lanes>(numbers + start) >= cuts);
    if (end - start < kWidth) lanes &= (1u << (end - start)) - 1;
    for (; lanes != 0; lanes &= lanes - 1) f(start + __builtin_ctz(lanes));
  }
}

}  // namespace rocketkv
