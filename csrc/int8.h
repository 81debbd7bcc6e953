// Keys and values in 8 bits: where they lie, and how a row is quantized. See ops/int8.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "simd.h"

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

}  // namespace rocketkv
