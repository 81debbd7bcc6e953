// Keys and values in 8 bits: taking in a row, and restoring one. See ops/int8.py.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace rocketkv {

constexpr int kNotFinite = -128;

inline int num_steps(int head_dim) { return (head_dim + kStepChannels - 1) / kStepChannels; }

// Minus infinity for kNotFinite, which makes NaN of a code, then zero.
inline float step_of(int8_t exponent) {
  uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  return load<float>(&bits);
}

// See quantize_rows in ops/int8.py.
template <class T>
inline void quantize_row(const T* row, int dim, int8_t* codes, int8_t* exponents) {
  constexpr int kLeast = std::is_same_v<T, Float16> ? -24 : -126;
  for (int c = 0; c < dim; c += kStepChannels) {
    const int end = std::min(c + kStepChannels, dim);
    uint32_t largest = 0;  // of floats that are not negative the order is that of their bits; a NaN is the largest
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

// kWidth numbers that T holds exactly.
inline void store_exact(float* p, Vec v) { store(p, v); }
inline void store_exact(Bfloat16* p, Vec v) {
  using Upper = uint16_t __attribute__((vector_size(2 * kWidth)));
  store(p, __builtin_convertvector(load<VecBits>(&v) >> 16, Upper));
}
inline void store_exact(Float16* p, Vec v) {
#if defined(__AVX512F__)
  store(p, _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store(p, _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<Float16>(v[i]);
#endif
}

template <class T>
ROCKETKV_INLINE void restore_row(const int8_t* codes, const int8_t* exponents, int dim, T* row) {
  using Codes = int8_t __attribute__((vector_size(kWidth)));
  int c = 0;
  for (; c + kWidth <= dim; c += kWidth)
    store_exact(row + c, __builtin_convertvector(load<Codes>(codes + c), Vec) * step_of(exponents[c / kStepChannels]));
  for (; c < dim; ++c) row[c] = from_float<T>(static_cast<float>(codes[c]) * step_of(exponents[c / kStepChannels]));
}

}  // namespace rocketkv
