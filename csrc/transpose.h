// The transposition of a square of 32-bit lanes.
#pragma once

#include <utility>

#include "simd.h"

namespace rocketkv {

// Lanes of two vectors that lie kStep rows apart: the first keeps the lanes whose index lacks the bit kStep and takes
// the second's lanes in place of the others; the second likewise.
template <int kStep, size_t... kLane>
inline void swap_lanes(Vec& a, Vec& b, std::index_sequence<kLane...>) {
  Vec first = __builtin_shufflevector(a, b, ((kLane & kStep) ? int(kWidth + kLane - kStep) : int(kLane))...);
  b = __builtin_shufflevector(a, b, ((kLane & kStep) ? int(kWidth + kLane) : int(kLane + kStep))...);
  a = first;
}

// Lane j of vector i becomes lane i of vector j.
template <int kStep = kWidth / 2>
inline void transpose(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i)
    if (!(i & kStep)) swap_lanes<kStep>(v[i], v[i + kStep], std::make_index_sequence<kWidth>());
  if constexpr (kStep > 1) transpose<kStep / 2>(v);
}

}  // namespace rocketkv
