// The k largest of many numbers. Bisection finds the cut above which they lie, so that the cost hardly depends on
// the numbers.
#pragma once

#include "pairs.h"

namespace rocketkv {

// The bits of a number as an integer. Numbers that are not negative have the order of their bits, and a NaN without its
// sign is above them all.
inline uint32_t order_bits(float x) { return load<uint32_t>(&x); }

using Lanes = int32_t __attribute__((vector_size(4 * kWidth)));

// How many of numbers[0 .. n) are above `bound`. Reads to the end of the last Vec.
inline int64_t count_above(const float* numbers, int64_t n, uint32_t bound) {
  const Lanes bounds = static_cast<int32_t>(bound) - Lanes{};
  constexpr int kCounts = 4;  // additions that do not wait for each other
  Lanes counts[kCounts] = {};
  auto count = [&](int64_t i, Lanes& sum) { sum = load<Lanes>(numbers + i) > bounds ? sum + 1 : sum; };
  int64_t i = 0;
  for (; i + kCounts * kWidth <= n; i += kCounts * kWidth)
    for (int j = 0; j < kCounts; ++j) count(i + j * kWidth, counts[j]);
  for (; i + kWidth <= n; i += kWidth) count(i, counts[0]);
  int64_t above = sum_lane((counts[0] + counts[1]) + (counts[2] + counts[3]));
  if (i < n) above += __builtin_popcount(lanes_that_hold(load<Lanes>(numbers + i) > bounds) & ((1u << (n - i)) - 1));
  return above;
}

// The bits of a cut: exactly `wanted` numbers are not below the cut or, where ties prevent that, the fewest possible
// above `wanted`. num_above(b) counts the numbers above b.
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

// Write start + i for each bit i of `lanes`.
inline int32_t* write_lanes(int32_t start, uint32_t lanes, int32_t* out) {
#if defined(__AVX512F__)
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  store(out,
        _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), _mm512_add_epi32(lane, _mm512_set1_epi32(start))));
  return out + __builtin_popcount(lanes);
#else
  for (; lanes != 0; lanes &= lanes - 1) *out++ = start + __builtin_ctz(lanes);
  return out;
#endif
}

// Write in order the indices, from `begin` to `end`, of the numbers above the cut and of the first `at_cut` that equal
// it. Returns where the next index would go. Reads to the end of the last Vec, and writes up to kWidth indices beyond.
inline int32_t* write_indices(uint32_t cut, int64_t at_cut, const float* numbers, int64_t begin, int64_t end,
                              int32_t* out) {
  const Lanes cuts = static_cast<int32_t>(cut) - Lanes{};
  for (int64_t start = begin; start < end; start += kWidth) {
    const Lanes bits = load<Lanes>(numbers + start);
    const uint32_t inside = end - start < kWidth ? (1u << (end - start)) - 1 : ~0u;
    uint32_t equal = lanes_that_hold(bits == cuts) & inside, lanes = lanes_that_hold(bits > cuts) & inside;
    for (; equal != 0 && at_cut > 0; equal &= equal - 1, --at_cut) lanes |= equal & -equal;
    out = write_lanes(static_cast<int32_t>(start), lanes, out);
  }
  return out;
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
