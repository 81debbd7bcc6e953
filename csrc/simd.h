// Vectors of floats, as wide as the instruction set for which the file is compiled, and what joins their lanes.
#pragma once

#include <cstdint>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "dtypes.h"

namespace rocketkv {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kWidth)));
using VecBits = uint32_t __attribute__((vector_size(4 * kWidth)));

// The least multiple of `multiple` that is not below n.
inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

inline Vec broadcast(float x) { return x - Vec{}; }

// GCC takes a function that does nothing but prefetch for one without effect and drops the calls of it. So `prefetch`,
// and every function that only calls it, is always inlined.
#define ROCKETKV_INLINE inline __attribute__((always_inline))
ROCKETKV_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
ROCKETKV_INLINE void prefetch(const void* p, int num_bytes) {
  for (int i = 0; i < num_bytes; i += 64) prefetch(static_cast<const char*>(p) + i);
}

// An empty asm that may change v: GCC keeps v in a register instead of loading it anew at each use.
inline void keep_in_register(Vec& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }  // b where either is NaN
inline Vec abs(Vec v) {                                 // a zero and a NaN, too, lose their sign
  VecBits bits = load<VecBits>(&v) & 0x7fffffffu;
  return load<Vec>(&bits);
}

// sum_lanes: the sum of the lanes of each of kSums vectors, by a tree that adds two of them at a time.
constexpr int kSums = kWidth > 8 ? kWidth : 8;

#if defined(__AVX512F__)
inline Vec sum_four(const Vec* v) {  // in each quarter: the quarter's sums of the four
  auto two = [](Vec a, Vec b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  Vec ab = two(v[0], v[1]), cd = two(v[2], v[3]);
  return __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
inline void sum_lanes(const Vec* v, float* out) {
  auto halve = [](Vec a, Vec b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  Vec low = halve(sum_four(v), sum_four(v + 4)), high = halve(sum_four(v + 8), sum_four(v + 12));
  store(out, __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                 __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
}
#elif defined(__AVX2__)
inline void sum_lanes(const Vec* v, float* out) {
  auto two = [](Vec a, Vec b) {
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  };
  Vec low = two(two(v[0], v[1]), two(v[2], v[3])), high = two(two(v[4], v[5]), two(v[6], v[7]));
  store(out, __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11) +
                 __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15));
}
#else
inline void sum_lanes(const Vec* v, float* out) {
  for (int i = 0; i < kSums; ++i) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
}
#endif

// Bit i says whether lane i of a comparison holds.
template <class Comparison>
inline uint32_t lanes_that_hold(Comparison comparison) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(comparison));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(comparison));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kWidth; ++i) lanes |= (comparison[i] & 1) << i;
  return lanes;
#endif
}

// Join all lanes into one number by `op`, half by half.
template <class V, class Op>
inline auto join_lanes(V v, Op op) {
  if constexpr (sizeof(V) == 64) {
    return join_lanes(op(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)),
                      op);
  } else if constexpr (sizeof(V) == 32) {
    return join_lanes(op(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)), op);
  } else {
    return op(op(v[0], v[1]), op(v[2], v[3]));
  }
}
template <class V>
inline auto max_lane(V v) {
  return join_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}
template <class V>
inline auto sum_lane(V v) {
  return join_lanes(v, [](auto a, auto b) { return a + b; });
}

// exp(x) for x <= 0, exact to about one unit in the last place. Below -87 the result is exp(-87); of a NaN it is a NaN.
inline Vec exp_of_negative(Vec x) {
  x = max(broadcast(-87.0f), x);
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec shifted = x * 1.44269504f + magic;
  Vec n = shifted - magic;
  Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  VecBits power = (load<VecBits>(&shifted) - 0x4b400000u + 127u) << 23;  // 2^n
  return p * load<Vec>(&power);
}

}  // namespace rocketkv
