// Low-bit keys: taking in one more token, and reading them. See ops/lowbit.py.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace rocketkv {

constexpr int kHalfGroup = kGroup / 2;
constexpr int kLevels = 15;

// The codes of one channel of the group at [channel * kBlockGroups * kHalfGroup], low halves first.
inline uint8_t* group_codes(const LowBitKeys& keys, int head_dim, int64_t head, int64_t group) {
  int64_t block = head * keys.num_blocks + group / kBlockGroups;
  return keys.codes + (block * head_dim * kBlockGroups + group % kBlockGroups) * kHalfGroup;
}

// The least value and the step of one channel of a block's groups: kBlockGroups times two numbers at
// [channel * kBlockGroups * 2].
template <class T>
inline T* block_ranges(const LowBitKeys& keys, int head_dim, int64_t head, int64_t block) {
  return static_cast<T*>(keys.ranges) + (head * keys.num_blocks + block) * head_dim * kBlockGroups * 2;
}

// The keys of a head's open group: channel c at [c * kGroup].
template <class T>
inline T* open_keys(const LowBitKeys& keys, int head_dim, int64_t head) {
  return static_cast<T*>(keys.open_keys) + head * head_dim * kGroup;
}

// See quantize_groups in ops/lowbit.py.
template <class T>
inline void close_group(const LowBitKeys& keys, int head_dim, int64_t head, int64_t group) {
  uint8_t* codes = group_codes(keys, head_dim, head, group);
  T* range = block_ranges<T>(keys, head_dim, head, group / kBlockGroups) + group % kBlockGroups * 2;
  const T* numbers = open_keys<T>(keys, head_dim, head);
  for (int c = 0; c < head_dim; ++c) {
    float low = to_float(numbers[0]), high = low;
    for (int i = 1; i < kGroup; ++i) {
      float x = to_float(numbers[i]);
      low = x < low || x != x ? x : low;  // what is no number stays
      high = x > high || x != x ? x : high;
    }
    range[0] = from_float<T>(low);
    range[1] = from_float<T>((high - low) / kLevels);
    const float step = to_float(range[1]);
    auto code = [&](int i) {
      float steps = std::nearbyint((to_float(numbers[i]) - low) / step);
      return steps > 0 ? static_cast<uint8_t>(std::min<float>(steps, kLevels)) : uint8_t{0};  // 0 / 0 where all are alike
    };
    for (int i = 0; i < kHalfGroup; ++i) codes[i] = static_cast<uint8_t>(code(i) | code(i + kHalfGroup) << 4);
    codes += kBlockGroups * kHalfGroup;
    range += kBlockGroups * 2;
    numbers += kGroup;
  }
}

// Let the open group take in the key, [D], of the token at `place`, and close it if it is full.
template <class T>
inline void append_key(const LowBitKeys& keys, int head_dim, int64_t head, int64_t place, const T* key) {
  T* numbers = open_keys<T>(keys, head_dim, head) + place % kGroup;
  for (int c = 0; c < head_dim; ++c) numbers[c * kGroup] = key[c];
  if (place % kGroup == kGroup - 1) close_group<T>(keys, head_dim, head, place / kGroup);
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

}  // namespace rocketkv
