// Dot products of stored rows with a few others: attention logits, exact scores and matrix-vector products alike.
#pragma once

#include <type_traits>

#include "simd.h"

namespace rocketkv {

constexpr int kMaxHeads = 4;  // rows of factors handled at once; more are done in blocks of four

// How many rows meet H rows of factors at once: as many as keep eight sums, which sum_lanes then adds up together.
constexpr int rows_at_once(int num_heads) { return num_heads == 1 ? 8 : num_heads == 2 ? 4 : 2; }

constexpr int kAhead = 8;  // rows between a prefetch and its use

// out[i * H + h] = rows[i] . x[h] for i < rows_at_once(H).
//
// rows: pointers to `count` channels of T; with Fetch, those kAhead further on are fetched for a later call.
// x: [H][x_stride] factors, zeros beyond `count`.
template <int H, bool Fetch, class T>
inline void dot_rows(const T* const* rows, const Factor<T>* x, int x_stride, int count, float* out) {
  constexpr int N = rows_at_once(H);
  Vec sums[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sums[i] = Vec{};
  auto add = [&](const Chunk<T>(&k)[N], int c) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
      Chunk<Factor<T>> factors(x + h * x_stride + c);
      factors.keep_in_registers();  // the compiler would load them anew for every row
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) k[i].add_product(factors, sums[i * H + h]);
    }
  };
  int whole = count / kPair * kPair;
  Chunk<T> k[N];
  for (int c = 0; c < whole; c += kPair) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      k[i] = Chunk<T>(rows[i] + c);
      if (Fetch) prefetch(rows[i + kAhead] + c);
    }
    add(k, c);
  }
  if (whole < count) {
    for (int i = 0; i < N; ++i) k[i] = Chunk<T>(Part<T>(rows[i] + whole, count - whole).numbers);
    add(k, whole);
  }
  float summed[8];
  sum_lanes(sums, summed);
  std::memcpy(out, summed, N * H * sizeof(float));
}

// Call f with the number of heads as a constant, for 1 to kMaxHeads.
template <class F>
inline void with_heads(int num_heads, F f) {
  switch (num_heads) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, 4>());
  }
}

}  // namespace rocketkv
