// The products of a prompt's attention: a few rows of lanes with a panel of others, the sums in registers.
#pragma once

#include "pairs.h"

namespace rocketkv {
namespace {

constexpr int kTileKeys = 256;                    // keys that rows meet before the next are packed
constexpr int kRowsAtOnce = 6;                    // with kVecsAtOnce, as many sums as the registers hold
constexpr int kVecsAtOnce = kWidth == 8 ? 2 : 4;  // AVX2 has 16 registers, the others 32
constexpr int kPanel = kVecsAtOnce * kWidth;      // lanes of a panel
constexpr int kMostSteps = 128;                   // products of a score added up at once: more would lose precision

// Return sum + a * b, lane by lane; a lane of two bfloat16 numbers adds both of its products.
template <class O>
inline Vec add_product_of_lanes(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(O) == 2) return add_products(sum, reinterpret_cast<VecBits>(a), reinterpret_cast<VecBits>(b));
#endif
  return sum + a * b;
}

// Return a vector whose lanes all equal this one.
inline Vec broadcast_lane(const float* lane) { return reinterpret_cast<Vec>(load<uint32_t>(lane) - VecBits{}); }

// Add to sums[i][x] the products of row i with vector x of the panel, over `steps` lanes.
//
// rows: lane s of row i is rows[i * kRowStride + s * kStepStride].
// panel: [steps][stride]; kVecs vectors are read of each step.
template <class O, int kVecs, int kRowStride, int kStepStride>
ROCKETKV_INLINE void add_products_of_rows(const float* rows, const float* panel, int64_t stride, int steps,
                                          Vec (&sums)[kRowsAtOnce][kVecs]) {
  for (int s = 0; s < steps; ++s, rows += kStepStride, panel += stride) {
    Vec others[kVecs];
#pragma GCC unroll 4
    for (int x = 0; x < kVecs; ++x) others[x] = load<Vec>(panel + x * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const Vec lane = broadcast_lane(rows + i * kRowStride);
#pragma GCC unroll 4
      for (int x = 0; x < kVecs; ++x) sums[i][x] = add_product_of_lanes<O>(sums[i][x], others[x], lane);
    }
  }
}

// Call f with a number of vectors, 1 to kVecsAtOnce, as a constant.
template <class F>
ROCKETKV_INLINE void with_vecs(int num_vecs, F f) {
  if constexpr (kVecsAtOnce > 2) {
    if (num_vecs >= 4) return f(std::integral_constant<int, 4>());
    if (num_vecs == 3) return f(std::integral_constant<int, 3>());
  }
  if (num_vecs >= 2) return f(std::integral_constant<int, 2>());
  return f(std::integral_constant<int, 1>());
}

// Write scores[i][key], the product of query i and a key, for the first keys up to a whole vector.
//
// queries: [steps][kRowsAtOnce]; keys: panels, [steps_stride][kPanel] each; scores: [kRowsAtOnce][kScoreStride].
template <class O, int kScoreStride>
inline void multiply_keys(const float* queries, const float* keys, int steps, int steps_stride, int num_keys,
                          float* scores) {
  for (int key = 0; key < num_keys; key += kPanel, keys += static_cast<int64_t>(steps_stride) * kPanel)
    with_vecs((num_keys - key + kWidth - 1) / kWidth, [&](auto vecs) {
      constexpr int kVecs = vecs;
      for (int s = 0; s < steps; s += kMostSteps) {
        Vec sums[kRowsAtOnce][kVecs] = {};
        add_products_of_rows<O, kVecs, 1, kRowsAtOnce>(queries + s * kRowsAtOnce, keys + s * kPanel, kPanel,
                                                       std::min(kMostSteps, steps - s), sums);
#pragma GCC unroll 8
        for (int i = 0; i < kRowsAtOnce; ++i)
#pragma GCC unroll 4
          for (int x = 0; x < kVecs; ++x) {
            float* score = scores + i * kScoreStride + key + x * kWidth;
            store(score, s > 0 ? load<Vec>(score) + sums[i][x] : sums[i][x]);
          }
      }
    });
}

// Multiply outputs[i] with shrink[i], and add the values weighted by row i.
//
// weights: [kRowsAtOnce][kWeightStride] lanes; values: [steps][padded] lanes; outputs: [kRowsAtOnce][padded].
template <class O, int kWeightStride>
inline void add_weighted_values(const float* weights, const float* values, int steps, int dim, int padded,
                                const float* shrink, float* outputs) {
  for (int c = 0; c < dim; c += kPanel)
    with_vecs((dim - c + kWidth - 1) / kWidth, [&](auto vecs) {
      constexpr int kVecs = vecs;
      Vec sums[kRowsAtOnce][kVecs];
#pragma GCC unroll 8
      for (int i = 0; i < kRowsAtOnce; ++i)
#pragma GCC unroll 4
        for (int x = 0; x < kVecs; ++x)
          sums[i][x] = load<Vec>(outputs + i * padded + c + x * kWidth) * broadcast(shrink[i]);
      add_products_of_rows<O, kVecs, kWeightStride, 1>(weights, values + c, padded, steps, sums);
#pragma GCC unroll 8
      for (int i = 0; i < kRowsAtOnce; ++i)
#pragma GCC unroll 4
        for (int x = 0; x < kVecs; ++x) store(outputs + i * padded + c + x * kWidth, sums[i][x]);
    });
}

}  // namespace
}  // namespace rocketkv
