// Vectors of floats, and loading the storage types into them. Everything else is written in terms of this file.
//
// Vec is as wide as the instruction set that the file is compiled for. Numbers are loaded two Vecs at a time ("a pair"):
// a pair of bfloat16 costs one load, one shift and one mask, if the even channels may go to one Vec and the odd ones to
// the other. So every type has its own order of channels within a pair; what meets it is brought into that order, and
// sums are put back by `in_order`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace rocketkv {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kPair = 2 * kWidth;

using Vec = float __attribute__((vector_size(4 * kWidth)));
using VecBits = uint32_t __attribute__((vector_size(4 * kWidth)));

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
#if defined(__aarch64__)
using Half = __fp16;  // as _Float16, which GCC's C++ has from version 13 on
#elif !defined(__F16C__)
using Half = _Float16;
#endif

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

inline Vec broadcast(float x) { return x - Vec{}; }

// Always inlined, as is whatever calls it and does nothing else: GCC takes such a function for one without effect and
// drops calls of it.
#define ROCKETKV_INLINE inline __attribute__((always_inline))
ROCKETKV_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
ROCKETKV_INLINE void prefetch(const void* p, int num_bytes) {
  for (int i = 0; i < num_bytes; i += 64) prefetch(static_cast<const char*>(p) + i);
}

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
inline Vec abs(Vec v) {  // a zero and a NaN, too, lose their sign
  VecBits bits = load<VecBits>(&v) & 0x7fffffffu;
  return load<Vec>(&bits);
}

// ---- one number

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return load<float>(&bits);
}
inline float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  return static_cast<float>(load<Half>(&x));
#endif
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline Bfloat16 from_float<Bfloat16>(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits = load<uint32_t>(&x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  Half half = static_cast<Half>(x);
  return load<Float16>(&half);
#endif
}

// ---- pairs

struct Pair {
  Vec a, b;
};

inline Pair load_pair(const float* p) { return {load<Vec>(p), load<Vec>(p + kWidth)}; }

inline Pair load_pair(const Bfloat16* p) {  // even channels, odd channels
  VecBits bits = load<VecBits>(p);
  VecBits even = bits << 16, odd = bits & 0xffff0000u;
  return {load<Vec>(&even), load<Vec>(&odd)};
}

inline Vec load_half(const Float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(load<__m256i>(p)));
#elif defined(__F16C__)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(load<__m128i>(p)));
#elif defined(__aarch64__)
  return reinterpret_cast<Vec>(vcvt_f32_f16(load<float16x4_t>(p)));  // GCC would convert one by one
#else
  using Halves = Half __attribute__((vector_size(2 * kWidth)));
  return __builtin_convertvector(load<Halves>(p), Vec);
#endif
}
inline Pair load_pair(const Float16* p) { return {load_half(p), load_half(p + kWidth)}; }

// A pair loaded from T with its channels in ascending order.
template <class T>
inline Pair in_order(Pair pair) {
  return pair;
}
template <>
inline Pair in_order<Bfloat16>(Pair pair) {
#if defined(__AVX512F__)
  return {__builtin_shufflevector(pair.a, pair.b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
          __builtin_shufflevector(pair.a, pair.b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
#elif defined(__AVX2__)
  return {__builtin_shufflevector(pair.a, pair.b, 0, 8, 1, 9, 2, 10, 3, 11),
          __builtin_shufflevector(pair.a, pair.b, 4, 12, 5, 13, 6, 14, 7, 15)};
#else
  return {__builtin_shufflevector(pair.a, pair.b, 0, 4, 1, 5), __builtin_shufflevector(pair.a, pair.b, 2, 6, 3, 7)};
#endif
}

// ---- products of stored numbers
//
// What stored rows are multiplied with, a query or weights, is first brought into the form of a Factor: floats, except
// where the CPU multiplies bfloat16 as they are, two to a lane, and adds the products to a float.

#if defined(__AVX512BF16__)
constexpr bool kMultipliesBfloat16 = true;
#else
constexpr bool kMultipliesBfloat16 = false;
#endif

template <class T>
using Factor = std::conditional_t<kMultipliesBfloat16 && std::is_same_v<T, Bfloat16>, Bfloat16, float>;

template <class T>
inline Factor<T> to_factor(T x) {
  if constexpr (std::is_same_v<Factor<T>, T>) {
    return x;
  } else {
    return to_float(x);
  }
}

// The first `count` numbers of a chunk of kPair, zeros after them.
template <class T>
struct Part {
  T numbers[kPair] = {};
  Part(const T* p, int count) { std::memcpy(numbers, p, count * sizeof(T)); }
};

// A row of `count` numbers as factors for rows of T, zeros up to a whole pair.
template <class T>
inline void prepare(const T* x, int count, Factor<T>* out) {
  for (int c = 0; c < count; c += kPair) {
    Part<T> part(x + c, std::min(kPair, count - c));
    if constexpr (std::is_same_v<Factor<T>, float>) {
      Pair pair = load_pair(part.numbers);
      store(out + c, pair.a);
      store(out + c + kWidth, pair.b);
    } else {
      std::memcpy(out + c, part.numbers, sizeof(part.numbers));
    }
  }
}

// kPair numbers of a row, and adding their products with as many factors to a sum.
template <class T>
struct Chunk {
  Pair pair;
  Chunk() = default;
  explicit Chunk(const T* p) : pair(load_pair(p)) {}
  void keep_in_registers() { keep_in_register(pair.a), keep_in_register(pair.b); }
  template <class F>
  void add_product(const Chunk<F>& other, Vec& sum) const {
    sum += pair.a * other.pair.a;
    sum += pair.b * other.pair.b;
  }
};

// kPair numbers of each of two rows, and adding the rows to a pair, each times a factor. The pair has an order of channels
// of its own, see `sums_in_order`.
template <class T>
struct TwoChunks {
  Pair first, second;
  explicit TwoChunks(const T* a) : first(load_pair(a)), second{Vec{}, Vec{}} {}
  TwoChunks(const T* a, const T* b) : first(load_pair(a)), second(load_pair(b)) {}
  void add_weighted(const float* factors, Pair& sum) const {
    sum.a += first.a * factors[0];
    sum.b += first.b * factors[0];
    sum.a += second.a * factors[1];
    sum.b += second.b * factors[1];
  }
  static Pair sums_in_order(Pair sums) { return in_order<T>(sums); }
};

// Round to factors and store them; returns what was stored.
inline Vec store_factors(float* p, Vec v) {
  store(p, v);
  return v;
}

#if defined(__AVX512BF16__)
inline Vec add_products(Vec sum, VecBits a, VecBits b) {
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                reinterpret_cast<__m512bh>(b)));
}

template <>
struct Chunk<Bfloat16> {
  VecBits bits;
  Chunk() = default;
  explicit Chunk(const Bfloat16* p) : bits(load<VecBits>(p)) {}
  void keep_in_registers() { asm("" : "+v"(bits)); }
  void add_product(const Chunk& other, Vec& sum) const { sum = add_products(sum, bits, other.bits); }
};

template <>
struct TwoChunks<Bfloat16> {
  VecBits low, high;  // of both rows, number beside number: the first and the second four of every eight
  explicit TwoChunks(const Bfloat16* a) : TwoChunks(load<__m512i>(a), __m512i{}) {}
  TwoChunks(const Bfloat16* a, const Bfloat16* b) : TwoChunks(load<__m512i>(a), load<__m512i>(b)) {}
  void add_weighted(const Bfloat16* factors, Pair& sum) const {
    VecBits both = load<uint32_t>(factors) - VecBits{};
    sum.a = add_products(sum.a, low, both);
    sum.b = add_products(sum.b, high, both);
  }
  static Pair sums_in_order(Pair sums) {
    return {__builtin_shufflevector(sums.a, sums.b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
            __builtin_shufflevector(sums.a, sums.b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31)};
  }

 private:
  TwoChunks(__m512i a, __m512i b)
      : low(reinterpret_cast<VecBits>(_mm512_unpacklo_epi16(a, b))),
        high(reinterpret_cast<VecBits>(_mm512_unpackhi_epi16(a, b))) {}
};

inline Vec store_factors(Bfloat16* p, Vec v) {
  auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
  store(p, rounded);
  return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}
#endif

// ---- across the lanes

// The sums of kSums vectors, by a tree that adds two of them at a time.
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
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
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

// Bit i: whether lane i of a comparison holds.
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

// All lanes joined into one number by `op`, half by half.
template <class V, class Op>
inline auto join_lanes(V v, Op op) {
  if constexpr (sizeof(V) == 64) {
    return join_lanes(op(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)), op);
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

// The largest of `most` less the smallest of `least`, `count` numbers each, 0 if there are none; what is no number stays.
template <class T>
inline float range_of(const T* least, const T* most, int count) {
  auto higher = [](auto x, auto best) { return (x > best) | (x != x) ? x : best; };
  auto lower = [](auto x, auto best) { return (x < best) | (x != x) ? x : best; };
  Vec highest = broadcast(-__builtin_inff()), lowest = -highest;
  int i = 0;
  for (; i + kPair <= count; i += kPair) {
    const Pair high = load_pair(most + i), low = load_pair(least + i);
    highest = higher(high.b, higher(high.a, highest));
    lowest = lower(low.b, lower(low.a, lowest));
  }
  float top = join_lanes(highest, higher), bottom = join_lanes(lowest, lower);
  for (; i < count; ++i) top = higher(to_float(most[i]), top), bottom = lower(to_float(least[i]), bottom);
  const float range = top - bottom;
  return range < 0 ? 0.0f : range;
}

// exp(x) for x <= 0, to about one unit in the last place; below -87 it gives exp(-87) instead of less, for NaN a NaN.
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
