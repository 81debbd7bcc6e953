// Dot products of stored rows with a few float rows: attention logits, exact scores and matrix-vector products alike.
#pragma once

#include <type_traits>

#include "simd.h"

namespace rocketkv {

constexpr int kMaxHeads = 4;  // float rows handled at once; more are done in blocks of four

// How many rows meet H float rows at once: as many as keep eight sums, which sum_lanes then adds up together.
constexpr int rows_at_once(int num_heads) { return num_heads == 1 ? 8 : num_heads == 2 ? 4 : 2; }

constexpr int kAhead = 8;  // rows between a prefetch and its use

// out[i * H + h] = rows[i] . x[h] for i < rows_at_once(H).
//
// rows: pointers to `count` channels of T; with Fetch, those kAhead further on are fetched for a later call. x: [H][x_stride] floats in the order of T, zeros beyond `count`.
template <int H, bool Fetch, class T>
inline void dot_rows(const T* const* rows, const float* x, int x_stride, int count, float* out) {
  constexpr int N = rows_at_once(H);
  Vec sums[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sums[i] = Vec{};
  int whole = count / kPair * kPair;
  for (int c = 0; c < whole; c += kPair) {
    Pair k[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      k[i] = load_pair(rows[i] + c);
      if (Fetch) __builtin_prefetch(rows[i + kAhead] + c);
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
      Vec a = load<Vec>(x + h * x_stride + c), b = load<Vec>(x + h * x_stride + c + kWidth);
      keep_in_register(a);  // the compiler would load it anew for every row
      keep_in_register(b);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sums[i * H + h] += k[i].a * a;
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sums[i * H + h] += k[i].b * b;
    }
  }
  float summed[8];
  sum_lanes(sums, summed);
  if (whole < count) {
    for (int i = 0; i < N; ++i)
      for (int h = 0; h < H; ++h) {
        Pair k = load_part(rows[i] + whole, count - whole);
        const float* rest = x + h * x_stride + whole;
        summed[i * H + h] += sum_lane(k.a * load<Vec>(rest) + k.b * load<Vec>(rest + kWidth));
      }
  }
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
