// The soft cap of logits.
#pragma once

#include "simd.h"

namespace rocketkv {

// tanh(x), exact to about two units in the last place; NaN for NaN. The polynomial is that of tanhf in Cephes.
inline Vec tanh(Vec x) {
  const Vec size = abs(x), squared = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = p * squared + 2.06390887954e-2f;
  p = p * squared - 5.37397155531e-2f;
  p = p * squared + 1.33314422036e-1f;
  p = p * squared - 3.33332819422e-1f;
  const Vec small = x + x * squared * p, e = exp_of_negative(size * -2.0f), large = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? small : (x < 0.0f ? -large : large);
}

// Replace numbers[0 .. n), of any length up to whole vectors, by outer * tanh(inner * number).
inline void cap(float* numbers, int64_t n, float inner, float outer) {
  for (int64_t i = 0; i < n; i += kWidth) store(numbers + i, tanh(load<Vec>(numbers + i) * inner) * outer);
}

}  // namespace rocketkv
