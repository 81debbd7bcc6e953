// Stored numbers as vectors of floats, and their products.
//
// Numbers are loaded two Vecs at a time, as a Pair. A pair of bfloat16 costs one load, one shift and one mask if the
// even channels may go to one Vec and the odd ones to the other. So every type has its own order of channels within a
// pair: whatever meets a pair is brought into that order, and `in_order` puts sums back.
#pragma once

#include <algorithm>
#include <type_traits>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "simd.h"

namespace rocketkv {

constexpr int kPair = 2 * kWidth;

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
// An Operand is a number that stored rows are multiplied with: a channel of a query, or a weight. Operands are floats,
// except where the CPU multiplies bfloat16 as they are, two to a lane, and adds the products to a float.

#if defined(__AVX512BF16__)
constexpr bool kMultipliesBfloat16 = true;
#else
constexpr bool kMultipliesBfloat16 = false;
#endif

template <class T>
using Operand = std::conditional_t<kMultipliesBfloat16 && std::is_same_v<T, Bfloat16>, Bfloat16, float>;

template <class T>
inline Operand<T> to_operand(T x) {
  if constexpr (std::is_same_v<Operand<T>, T>) {
    return x;
  } else {
    return to_float(x);
  }
}

// The first `count` numbers of a chunk of kPair, with zeros after them.
template <class T>
struct Part {
  T numbers[kPair] = {};
  Part(const T* p, int count) { std::memcpy(numbers, p, count * sizeof(T)); }
};

// Write a row of `count` numbers as operands for rows of T, with zeros up to a whole pair.
template <class T>
inline void prepare_operands(const T* x, int count, Operand<T>* out) {
  for (int c = 0; c < count; c += kPair) {
    Part<T> part(x + c, std::min(kPair, count - c));
    if constexpr (std::is_same_v<Operand<T>, float>) {
      Pair pair = load_pair(part.numbers);
      store(out + c, pair.a);
      store(out + c + kWidth, pair.b);
    } else {
      std::memcpy(out + c, part.numbers, sizeof(part.numbers));
    }
  }
}

// kPair numbers of a row; `add_product` adds their products with as many operands to a sum.
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

// kPair numbers of each of two rows; `add_weighted` adds the rows to a pair, each times its weight. The sums have an
// order of channels of their own, which `sums_in_order` turns into ascending order.
template <class T>
struct RowPair {
  Pair first, second;
  explicit RowPair(const T* a) : first(load_pair(a)), second{Vec{}, Vec{}} {}
  RowPair(const T* a, const T* b) : first(load_pair(a)), second(load_pair(b)) {}
  void add_weighted(const float* weights, Pair& sum) const {
    sum.a += first.a * weights[0];
    sum.b += first.b * weights[0];
    sum.a += second.a * weights[1];
    sum.b += second.b * weights[1];
  }
  static Pair sums_in_order(Pair sums) { return in_order<T>(sums); }
};

// Round numbers to operands and store them; returns what was stored.
inline Vec store_operands(float* p, Vec v) {
  store(p, v);
  return v;
}

#if defined(__AVX512BF16__)
inline Vec add_products(Vec sum, VecBits a, VecBits b) {
  return reinterpret_cast<Vec>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
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
struct RowPair<Bfloat16> {
  VecBits low, high;  // both rows, number beside number: the first and the second four of every eight
  explicit RowPair(const Bfloat16* a) : RowPair(load<__m512i>(a), __m512i{}) {}
  RowPair(const Bfloat16* a, const Bfloat16* b) : RowPair(load<__m512i>(a), load<__m512i>(b)) {}
  void add_weighted(const Bfloat16* weights, Pair& sum) const {
    VecBits both = load<uint32_t>(weights) - VecBits{};
    sum.a = add_products(sum.a, low, both);
    sum.b = add_products(sum.b, high, both);
  }
  static Pair sums_in_order(Pair sums) {
    return {__builtin_shufflevector(sums.a, sums.b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
            __builtin_shufflevector(sums.a, sums.b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31)};
  }

 private:
  RowPair(__m512i a, __m512i b)
      : low(reinterpret_cast<VecBits>(_mm512_unpacklo_epi16(a, b))),
        high(reinterpret_cast<VecBits>(_mm512_unpackhi_epi16(a, b))) {}
};

inline Vec store_operands(Bfloat16* p, Vec v) {
  auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
  store(p, rounded);
  return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}
#endif

// The largest of `most` less the smallest of `least`, `count` numbers each; 0 if there are none, NaN if one is NaN.
template <class T>
inline float range_of(const T* least, const T* most, int count) {
  auto higher = [](auto x, auto best) { return ((x > best) | (x != x)) ? x : best; };
  auto lower = [](auto x, auto best) { return ((x < best) | (x != x)) ? x : best; };
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

}  // namespace rocketkv
