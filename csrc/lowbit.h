// The index of keys in 4 bits: how it takes in one more token, and how its codes are read. See ops/lowbit.py.
#pragma once

#include <cmath>

#include "kernels.h"
#include "pairs.h"

namespace rocketkv {

constexpr int kHalfGroup = kGroup / 2;

// The codes of one channel of the group at [channel * kGroupsPerBlock * kHalfGroup], low halves first.
inline uint8_t* group_codes(const LowBitKeys& keys, int head_dim, int64_t head, int64_t group) {
  int64_t block = head * keys.num_blocks + group / kGroupsPerBlock;
  return keys.codes + (block * head_dim * kGroupsPerBlock + group % kGroupsPerBlock) * kHalfGroup;
}

// The least value and the step of one channel of a block's groups: kGroupsPerBlock times two numbers at
// [channel * kGroupsPerBlock * 2].
template <class T>
inline T* block_ranges(const LowBitKeys& keys, int head_dim, int64_t head, int64_t block) {
  return static_cast<T*>(keys.ranges) + (head * keys.num_blocks + block) * head_dim * kGroupsPerBlock * 2;
}

// The keys of a head's open group: channel c at [c * kGroup].
template <class T>
inline T* open_keys(const LowBitKeys& keys, int head_dim, int64_t head) {
  return static_cast<T*>(keys.open_keys) + head * head_dim * kGroup;
}

// Quantize the open group's keys. See quantize_groups in ops/lowbit.py.
template <class T>
inline void close_group(const LowBitKeys& keys, int head_dim, int64_t head, int64_t group) {
  uint8_t* codes = group_codes(keys, head_dim, head, group);
  T* range = block_ranges<T>(keys, head_dim, head, group / kGroupsPerBlock) + group % kGroupsPerBlock * 2;
  const T* numbers = open_keys<T>(keys, head_dim, head);
  for (int c = 0; c < head_dim; ++c) {
    float low = to_float(numbers[0]), high = low;
    for (int i = 1; i < kGroup; ++i) {
      float x = to_float(numbers[i]);
      low = x < low || x != x ? x : low;  // a NaN stays
      high = x > high || x != x ? x : high;
    }
    range[0] = from_float<T>(low);
    range[1] = from_float<T>((high - low) / kLevels);
    const float step = to_float(range[1]);
    auto code = [&](int i) {
      float steps = std::nearbyint((to_float(numbers[i]) - low) / step);
      return steps > 0 ? static_cast<uint8_t>(std::min<float>(steps, kLevels))
                       : uint8_t{0};  // 0 / 0 is NaN where all numbers are alike
    };
    for (int i = 0; i < kHalfGroup; ++i) codes[i] = static_cast<uint8_t>(code(i) | code(i + kHalfGroup) << 4);
    codes += kGroupsPerBlock * kHalfGroup;
    range += kGroupsPerBlock * 2;
    numbers += kGroup;
  }
}

// Let the open group take in the key, [D], of the token of rank `rank`, and close the group if it is full.
template <class T>
inline void append_key(const LowBitKeys& keys, int head_dim, int64_t head, int64_t rank, const T* key) {
  T* numbers = open_keys<T>(keys, head_dim, head) + rank % kGroup;
  for (int c = 0; c < head_dim; ++c) numbers[c * kGroup] = key[c];
  if (rank % kGroup == kGroup - 1) close_group<T>(keys, head_dim, head, rank / kGroup);
}

// Let the spread take in the group that the newest of `length` tokens has closed. Before the first group is closed, the
// spread is the range of all keys. See ops/lowbit.py.
template <class T>
inline void extend_spread(const LowBitKeys& keys, int head_dim, int64_t head, int64_t length) {
  float* spread = keys.spread + head * head_dim;
  if (length < kGroup) {
    const T* numbers = open_keys<T>(keys, head_dim, head);
    for (int c = 0; c < head_dim; ++c, numbers += kGroup)
      spread[c] = range_of(numbers, numbers, static_cast<int>(length));
  } else if (length % kGroup == 0) {
    const int64_t group = length / kGroup - 1;
    const T* range = block_ranges<T>(keys, head_dim, head, group / kGroupsPerBlock) + group % kGroupsPerBlock * 2;
    for (int c = 0; c < head_dim; ++c, range += kGroupsPerBlock * 2) {
      const float step = to_float(range[1]);
      spread[c] = group == 0 ? step : spread[c] + step;
    }
  }
}

// The least values and the steps of kWidth groups.
template <class T>
inline Pair load_ranges(const T* p) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    return load_pair(p);
  } else {
    float low[kWidth], step[kWidth];
    for (int i = 0; i < kWidth; ++i) low[i] = to_float(p[2 * i]), step[i] = to_float(p[2 * i + 1]);
    return {load<Vec>(low), load<Vec>(step)};
  }
}

// kWidth bytes of codes as numbers: the low halves and the high ones.
inline Pair load_codes(const uint8_t* p) {
#if defined(__AVX512F__)
  __m512i bytes = _mm512_cvtepu8_epi32(load<__m128i>(p));
  return {reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15)))),
          reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_srli_epi32(bytes, 4)))};
#elif defined(__AVX2__)
  __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15)))),
          reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4)))};
#else
  Pair pair;
  for (int i = 0; i < kWidth; ++i) pair.a[i] = static_cast<float>(p[i] & 15), pair.b[i] = static_cast<float>(p[i] >> 4);
  return pair;
#endif
}

// Round the weights of codes to bfloat16 if the keys are bfloat16.
template <class T>
inline Vec round_weights(Vec v) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    VecBits bits = load<VecBits>(&v), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    return v == v ? load<Vec>(&rounded) : v;
  } else {
    return v;
  }
}

// kWidth bytes of codes of each of two channels. `add_weighted` adds the codes plus kOffset, each channel times its
// weight, to the sums of the low halves and of the high halves.
template <class T>
struct CodePair {
  static constexpr float kOffset = 0;
  static constexpr int kWeights = 2 * kGroupsPerBlock;  // floats that hold both channels' weights in a block's groups
  Pair first, second;
  CodePair(const uint8_t* a, const uint8_t* b) : first(load_codes(a)), second(load_codes(b)) {}
  static void store_weights(float* weights, Vec a, Vec b) { store(weights, a), store(weights + kGroupsPerBlock, b); }
  void add_weighted(const float* weights, Pair& sum) const {
    sum.a += first.a * weights[0];
    sum.b += first.b * weights[0];
    sum.a += second.a * weights[kGroupsPerBlock];
    sum.b += second.b * weights[kGroupsPerBlock];
  }
};

#if defined(__AVX512BF16__)
template <>
struct CodePair<Bfloat16> {
  static constexpr float kOffset = 16;  // 16 plus a code is a bfloat16 with the code as the upper bits of its fraction
  static constexpr int kWeights = kGroupsPerBlock;
  VecBits low, high;  // both channels, number beside number
  CodePair(const uint8_t* a, const uint8_t* b) {
    VecBits both = reinterpret_cast<VecBits>(_mm512_cvtepu8_epi32(load<__m128i>(a))) |
                   reinterpret_cast<VecBits>(_mm512_cvtepu8_epi32(load<__m128i>(b))) << 16;
    low = (both << 3 & 0x00780078u) | 0x41804180u;
    high = (both >> 1 & 0x00780078u) | 0x41804180u;
  }
  static void store_weights(float* weights, Vec a, Vec b) {
    store(weights, load<VecBits>(&a) >> 16 | load<VecBits>(&b));
  }
  void add_weighted(const float* weights, Pair& sum) const {
    VecBits both = load<uint32_t>(weights) - VecBits{};
    sum.a = add_products(sum.a, low, both);
    sum.b = add_products(sum.b, high, both);
  }
};
#endif

}  // namespace rocketkv
