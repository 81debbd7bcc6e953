// Dot products of stored rows with a few operands: attention logits, exact scores and matrix-vector products.
#pragma once

#include <type_traits>

#include "pairs.h"

namespace rocketkv {

constexpr int kMaxHeads = 4;  // rows of operands handled at once; more are done in blocks of four

// How many rows meet H rows of operands at once: as many as make the kSums sums that sum_lanes adds up together.
constexpr int rows_at_once(int num_heads) { return num_heads == 1 ? 8 : num_heads == 2 ? kSums / 2 : kSums / 4; }

constexpr int kAhead = 8;  // rows between a prefetch and its use

// out[h * rows_at_once(H) + i] = rows[i] . x[h] for i < rows_at_once(H); `out` has room for kSums.
//
// rows: pointers to `count` channels of T; with Fetch, those kAhead further on are fetched for a later call.
// x: [H][x_stride] operands, zeros beyond `count`.
template <int H, bool Fetch, class T>
inline void dot_rows(const T* const* rows, const Operand<T>* x, int x_stride, int count, float* out) {
  constexpr int N = rows_at_once(H);
  Vec sums[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) sums[i] = Vec{};
  const int whole = count / kPair * kPair;
  for (int c = 0; c < whole; c += kPair) {
    Chunk<T> k[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      k[i] = Chunk<T>(rows[i] + c);
      if (Fetch) prefetch(rows[i + kAhead] + c);
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
      Chunk<Operand<T>> operands(x + h * x_stride + c);
      operands.keep_in_registers();  // GCC would load them anew for every row
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) k[i].add_product(operands, sums[h * N + i]);
    }
  }
  if (whole < count) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      Part<T> part(rows[i] + whole, count - whole);
      Chunk<T> k(part.numbers);
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) k.add_product(Chunk<Operand<T>>(x + h * x_stride + whole), sums[h * N + i]);
    }
  }
  sum_lanes(sums, out);
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
