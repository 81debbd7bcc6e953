// Queries, keys and values of a prompt as the products of prefill_product.h read them.
//
// All three become lanes of 32 bits. A lane holds kDepth numbers that are multiplied and added together: two bfloat16
// where the CPU multiplies these, else one float. Queries and keys have such lanes along their channels, values along
// the keys.
#pragma once

#include "pairs.h"
#include "prefill_product.h"
#include "transpose.h"

namespace rocketkv {
namespace {

template <class T>
constexpr int kDepth = sizeof(float) / sizeof(Operand<T>);

// Return kPair channels of a row as lanes along the channels: 2 / kDepth vectors.
template <class T>
inline void load_lanes(const T* row, Vec* lanes) {
  if constexpr (kDepth<T> == 2) {
    lanes[0] = load<Vec>(row);
  } else {
    const Pair pair = in_order<T>(load_pair(row));
    lanes[0] = pair.a, lanes[1] = pair.b;
  }
}

// Return the last channels likewise, with zeros after them.
template <class T>
inline void load_lanes(const T* row, int count, Vec* lanes) {
  if (count >= kPair) return load_lanes(row, lanes);
  Part<T> part(row, count);
  load_lanes(part.numbers, lanes);
}

// Pack `count` keys as panels, [panels][padded / kDepth][kPanel]; the panel of the last keys has zeros up to a whole
// vector. Keys lie `stride` numbers apart.
template <class T>
inline void pack_keys(const T* keys, int64_t stride, int count, int dim, int padded, float* out) {
  constexpr int kVecs = 2 / kDepth<T>;
  const int steps = padded / kDepth<T>;
  for (int key = 0; key < count; key += kWidth) {
    float* panel = out + static_cast<int64_t>(key / kPanel) * steps * kPanel + key % kPanel;
    for (int c = 0; c < dim; c += kPair) {
      Vec rows[kVecs][kWidth];
      for (int i = 0; i < kWidth; ++i) {
        Vec lanes[kVecs] = {};
        if (key + i < count) load_lanes(keys + (key + i) * stride + c, dim - c, lanes);
        for (int x = 0; x < kVecs; ++x) rows[x][i] = lanes[x];
      }
      for (int x = 0; x < kVecs; ++x) {
        transpose(rows[x]);
        for (int i = 0; i < kWidth; ++i) store(panel + (c / kDepth<T> + x * kWidth + i) * kPanel, rows[x][i]);
      }
    }
  }
}

// Pack `count` values as [keys / kDepth][padded]; a last key without a second has zeros in its place.
template <class T>
inline void pack_values(const T* values, int64_t stride, int count, int dim, int padded, float* out) {
  for (int key = 0; key < count; key += kDepth<T>, out += padded) {
    for (int c = 0; c < dim; c += kPair) {
      Vec lanes[2] = {};
      load_lanes(values + key * stride + c, dim - c, lanes);
#if defined(__AVX512BF16__)
      if constexpr (kDepth<T> == 2) {
        if (key + 1 < count) load_lanes(values + (key + 1) * stride + c, dim - c, lanes + 1);
        const __m512i first = reinterpret_cast<__m512i>(lanes[0]), second = reinterpret_cast<__m512i>(lanes[1]);
        auto join = [](__m256i a, __m256i b) {
          return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
        };
        lanes[0] = reinterpret_cast<Vec>(join(_mm512_castsi512_si256(first), _mm512_castsi512_si256(second)));
        lanes[1] =
            reinterpret_cast<Vec>(join(_mm512_extracti64x4_epi64(first, 1), _mm512_extracti64x4_epi64(second, 1)));
      }
#endif
      store(out + c, lanes[0]), store(out + c + kWidth, lanes[1]);
    }
  }
}

// Pack a query as one of the kRowsAtOnce rows of a group, [padded / kDepth][kRowsAtOnce].
template <class T>
inline void pack_query(const T* query, int dim, float* out) {
  constexpr int kVecs = 2 / kDepth<T>;
  for (int c = 0; c < dim; c += kPair) {
    Vec lanes[kVecs];
    load_lanes(query + c, dim - c, lanes);
    float numbers[kVecs * kWidth];
    std::memcpy(numbers, lanes, sizeof(numbers));
    for (int i = 0; i < kVecs * kWidth; ++i)
      std::memcpy(out + (c / kDepth<T> + i) * kRowsAtOnce, numbers + i, sizeof(float));
  }
}

}  // namespace
}  // namespace rocketkv
