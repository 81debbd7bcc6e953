// The soft cap of logits.
#pragma once

#include "simd.h"

namespace rocketkv {

// tanh(x), exact to three units in the last place; NaN for NaN. The rational function is that of Eigen's tanh of
// floats.
inline Vec tanh(Vec x) {
  const Vec most = broadcast(7.90531110763549805f);  // from here on the function is 1
  x = x > most ? most : x;
  x = x < -most ? -most : x;
  const Vec squared = x * x;
  Vec p = broadcast(-2.76076847742355e-16f);
  p = p * squared + 2.00018790482477e-13f;
  p = p * squared - 8.60467152213735e-11f;
  p = p * squared + 5.12229709037114e-08f;
  p = p * squared + 1.48572235717979e-05f;
  p = p * squared + 6.37261928875436e-04f;
  p = p * squared + 4.89352455891786e-03f;
  Vec q = broadcast(1.19825839466702e-06f);
  q = q * squared + 1.18534705686654e-04f;
  q = q * squared + 2.26843463243900e-03f;
  q = q * squared + 4.89352518554385e-03f;
  return x * p / q;
}

// Replace numbers[0 .. n), of any length up to whole vectors, by outer * tanh(inner * number).
inline void cap(float* numbers, int64_t n, float inner, float outer) {
  for (int64_t i = 0; i < n; i += kWidth) store(numbers + i, tanh(load<Vec>(numbers + i) * inner) * outer);
}

}  // namespace rocketkv
