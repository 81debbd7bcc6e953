// Keys and values in 8 bits: how a row is quantized, and how it is restored. See ops/int8.py.
#pragma once

#include <cmath>

#include "kernels.h"
#include "pairs.h"

namespace rocketkv {

inline int num_steps(int head_dim) { return (head_dim + kStepChannels - 1) / kStepChannels; }

// The step of an exponent, a power of two. For kNotFinite it is minus infinity, which makes NaN of a code of zero.
inline float step_of(int8_t exponent) {
  uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  return load<float>(&bits);
}

// Where the codes and exponents of one head's tokens lie, by slot.
struct Codes {
  int8_t *keys, *values, *exponents;
  int dim, steps;
  int8_t* key(int64_t slot) const { return keys + slot * dim; }
  int8_t* value(int64_t slot) const { return values + slot * dim; }
  int8_t* key_exponents(int64_t slot) const { return exponents + slot * 2 * steps; }
  int8_t* value_exponents(int64_t slot) const { return key_exponents(slot) + steps; }
  ROCKETKV_INLINE void fetch(int64_t slot) const {
    prefetch(key(slot), dim), prefetch(value(slot), dim), prefetch(key_exponents(slot));
  }
};

// Quantize the channels of a row. See quantize_rows in ops/int8.py.
template <class T>
inline void quantize_row(const T* row, int dim, int8_t* codes, int8_t* exponents) {
  constexpr int kLeast = std::is_same_v<T, Float16> ? -24 : -126;
  for (int c = 0; c < dim; c += kStepChannels) {
    const int end = std::min(c + kStepChannels, dim);
    uint32_t largest = 0;  // bits: floats that are not negative have the order of their bits, a NaN above them all
    for (int i = c; i < end; ++i) {
      float x = to_float(row[i]);
      largest = std::max(largest, load<uint32_t>(&x) & 0x7fffffffu);
    }
    const int raised = static_cast<int>(largest >> 23);
    const int exponent = raised == 255 ? kNotFinite : std::max(raised - (127 + 6), kLeast);
    const float step = step_of(static_cast<int8_t>(exponent));
    for (int i = c; i < end; ++i) {
      float code = std::nearbyint(to_float(row[i]) / step);
      codes[i] = exponent == kNotFinite ? int8_t{0} : static_cast<int8_t>(std::clamp(code, -127.0f, 127.0f));
    }
    exponents[c / kStepChannels] = static_cast<int8_t>(exponent);
  }
}

// kWidth codes as numbers.
inline Vec load_int8(const int8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p))));
#elif defined(__AVX2__)
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

// Store numbers that T holds exactly, in ascending order of channels.
inline void store_exact(float* p, Pair pair) { store(p, pair.a), store(p + kWidth, pair.b); }
inline void store_exact(Bfloat16* p, Pair pair) {
#if defined(__AVX512F__)
  // The upper halves of a's numbers, then of b's.
  const __m512i halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                                          25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  store(p, _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(pair.a), halves, reinterpret_cast<__m512i>(pair.b)));
#elif defined(__AVX2__)
  __m256i a = _mm256_srli_epi32(reinterpret_cast<__m256i>(pair.a), 16);
  __m256i b = _mm256_srli_epi32(reinterpret_cast<__m256i>(pair.b), 16);
  store(p, _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8));
#else
  for (int i = 0; i < kWidth; ++i)
    p[i] = from_float<Bfloat16>(pair.a[i]), p[kWidth + i] = from_float<Bfloat16>(pair.b[i]);
#endif
}
inline void store_exact(Float16* p, Pair pair) {
#if defined(__AVX512F__)
  store(p, _mm512_cvtps_ph(reinterpret_cast<__m512>(pair.a), _MM_FROUND_TO_NEAREST_INT));
  store(p + kWidth, _mm512_cvtps_ph(reinterpret_cast<__m512>(pair.b), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store(p, _mm256_cvtps_ph(reinterpret_cast<__m256>(pair.a), _MM_FROUND_TO_NEAREST_INT));
  store(p + kWidth, _mm256_cvtps_ph(reinterpret_cast<__m256>(pair.b), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i)
    p[i] = from_float<Float16>(pair.a[i]), p[kWidth + i] = from_float<Float16>(pair.b[i]);
#endif
}

// Write the row of T that codes and exponents stand for.
template <class T>
ROCKETKV_INLINE void restore_row(const int8_t* codes, const int8_t* exponents, int dim, T* row) {
  int c = 0;
  for (; c + kPair <= dim; c += kPair) {
    const Vec step = broadcast(step_of(exponents[c / kStepChannels]));
    store_exact(row + c, {load_int8(codes + c) * step, load_int8(codes + c + kWidth) * step});
  }
  for (; c < dim; ++c) row[c] = from_float<T>(static_cast<float>(codes[c]) * step_of(exponents[c / kStepChannels]));
}

}  // namespace rocketkv
