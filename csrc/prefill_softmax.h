// The softmax of a prompt's attention, taken tile by tile (FlashAttention, arXiv:2205.14135, "Algorithm 1").
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "pairs.h"

namespace rocketkv {
namespace {

// Return 2^x for x <= 0: 0 below -126, and NaN for NaN. The relative error is 1e-7 where weights are floats, and 3e-6
// where they are rounded to bfloat16.
template <class O>
inline Vec exp2_of_negative(Vec given) {
  Vec x = max(broadcast(-126.0f), given);
  const Vec magic = broadcast(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec shifted = x + magic;
  const Vec r = x - (shifted - magic);
  Vec p;
  if constexpr (sizeof(O) == 2) {
    p = r * 9.5701014333e-3f + 5.5917860282e-2f;
    p = p * r + 2.4024744840e-1f;
    p = p * r + 6.9312181474e-1f;
    p = p * r + 9.9999926144e-1f;
  } else {
    p = r * 1.5345811579e-4f + 1.3399931215e-3f;
    p = p * r + 9.6184889587e-3f;
    p = p * r + 5.5503287770e-2f;
    p = p * r + 2.4022646891e-1f;
    p = p * r + 6.9314720574e-1f;
    p = p * r + 1.0f;
  }
  const VecBits power = load<VecBits>(&shifted) << 23;  // 2^n, n the integer: 127 is added to it already
  return given < broadcast(-126.0f) ? Vec{} : p * load<Vec>(&power);
}

constexpr float kLog2e = 1.44269504f;  // the softmax counts in powers of two

// Return by what a difference of scores is multiplied so that two to its power is a weight; scale makes scores logits.
inline float power_of_two_factor(float scale) { return std::min(scale * kLog2e, std::numeric_limits<float>::max()); }

// What the softmax of a row knows of the tiles before: the largest score, and the sum of the weights relative to it.
struct Softmax {
  static constexpr float kLeast = -std::numeric_limits<float>::infinity();
  float largest = kLeast, sum = 0;

  // Turn a tile's scores into weights, of which those from `visible` to `count` are zero.
  //
  // factor: a weight is two to the power of it times the score. weights: room for whole vectors of `count`.
  // Returns the factor by which the sums of the tiles before shrink.
  template <class O>
  float weigh(const float* scores, int visible, int count, float factor, O* weights) {
    const float before = largest;
    if (visible > 0) largest = std::max(largest, largest_of(scores, visible));
    if (largest == kLeast && std::none_of(scores, scores + std::max(visible, 0), [](float x) { return x != x; }))
      visible = 0;  // nothing is seen but logits of minus infinity, which have no weight
    const Vec shift = broadcast(largest);
    Vec sums = {};
    int j = 0;
    for (; j + kWidth <= visible; j += kWidth) {
      const Vec weight = exp2_of_negative<O>((load<Vec>(scores + j) - shift) * factor);
      sums += weight;
      store_operands(weights + j, weight);
    }
    if (j < visible) {
      const Vec weight = exp2_of_negative<O>((load<Vec>(scores + j) - shift) * factor);
      const Vec kept = lane_numbers() < static_cast<float>(visible - j) ? weight : Vec{};
      sums += kept;
      store_operands(weights + j, kept);
      j += kWidth;
    }
    for (; j < count; j += kWidth) store_operands(weights + j, Vec{});
    const float shrink = visible > 0 ? std::exp2((before - largest) * factor) : 1.0f;
    sum = sum * shrink + sum_lane(sums);
    return shrink;
  }

  // Return what a row's sums are multiplied with in the end; 0 if nothing has a weight.
  //
  // sink: the binary logarithm of a weight that is added to those of the tokens, before their shift; minus infinity
  // adds none.
  float normalizer(float factor, float sink) const {
    const float total = sink == kLeast ? sum : sum + std::exp2(sink - largest * factor);
    return total == 0 ? 0.0f : 1.0f / total;
  }

 private:
  static Vec lane_numbers() {
    Vec lanes;
    for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<float>(i);
    return lanes;
  }

  // Return the largest of the first scores; NaN is passed over.
  static float largest_of(const float* scores, int count) {
    Vec best = broadcast(kLeast);
    int j = 0;
    for (; j + kWidth <= count; j += kWidth) best = max(load<Vec>(scores + j), best);
    if (j < count) {
      const Vec last = load<Vec>(scores + j);
      best = max(lane_numbers() < static_cast<float>(count - j) ? last : broadcast(kLeast), best);
    }
    return max_lane(best);
  }
};

}  // namespace
}  // namespace rocketkv
