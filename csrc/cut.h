// The k best of many numbers: where to cut, found by bisection, so that the cost does not depend on the numbers.
#pragma once

#include "simd.h"

namespace rocketkv {

// Numbers that are not negative are in the order of their bits, and a NaN without its sign is above them all.
inline uint32_t order_bits(float x) { return load<uint32_t>(&x); }

using Lanes = int32_t __attribute__((vector_size(4 * kWidth)));

// How many of numbers[0 .. n) are above `bound`.
inline int64_t count_above(const float* numbers, int64_t n, uint32_t bound) {
  Lanes bounds = static_cast<int32_t>(bound) - Lanes{}, count = {};
  int64_t whole = n / kWidth * kWidth, sum = 0;
  for (int64_t i = 0; i < whole; i += kWidth) count -= load<Lanes>(numbers + i) > bounds;
  for (int i = 0; i < kWidth; ++i) sum += count[i];
  for (int64_t i = whole; i < n; ++i) sum += order_bits(numbers[i]) > bound;
  return sum;
}

// The largest number such that those from it on are enough; is_enough(b) tells of the numbers above b.
template <class IsEnough>
inline uint32_t find_cut(IsEnough is_enough) {
  uint32_t cut = 0;
  for (uint32_t bit = 1u << 30; bit != 0; bit >>= 1)
    if (is_enough((cut | bit) - 1)) cut |= bit;
  return cut;
}

}  // namespace rocketkv
