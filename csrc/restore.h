// Rows of keys and values from their codes of 8 bits. See dequantize_tokens in ops/int8.py.
#pragma once

#include "int8.h"
#include "pairs.h"

namespace rocketkv {

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
