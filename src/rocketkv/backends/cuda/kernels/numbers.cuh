// The dtypes of a layer's numbers, their conversion to float, and loads of several at once.
#pragma once

#ifdef __CUDACC_RTC__
#include "device.cuh"
#endif

using int64 = long long;

struct Float16 {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

using T = DTYPE;  // the dtype of queries, new keys and values, and outputs

constexpr float MOST = 3.402823466e38f;  // the largest finite float
constexpr unsigned ALL = 0xffffffffu;    // the mask of all lanes of a warp
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fffffffu); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(signed char x) { return x; }
__device__ __forceinline__ float to_float(Float16 x) { return half_to_float(x.bits); }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <class N>
__device__ __forceinline__ N from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return {float_to_half(x)};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {float_to_bfloat16(x)};
}

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

__device__ constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }
__device__ constexpr int least(int a, int b) { return a < b ? a : b; }

// Numbers that are not negative, as integers in the same order; NaN is above them all.
__device__ __forceinline__ unsigned ordered(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Convert a word's worth of numbers, the lowest bits first.
template <class N>
__device__ __forceinline__ void unpack_word(unsigned word, float* out) {
  if constexpr (is_same<N, float>) {
    out[0] = __uint_as_float(word);
  } else if constexpr (is_same<N, BFloat16>) {
    out[0] = __uint_as_float(word << 16), out[1] = __uint_as_float(word & 0xffff0000u);
  } else if constexpr (is_same<N, Float16>) {
    out[0] = half_to_float(word & 0xffffu), out[1] = half_to_float(word >> 16);
  } else {
    for (int i = 0; i < 4; ++i) out[i] = static_cast<signed char>(word >> 8 * i & 0xffu);
  }
}

// COUNT numbers as they are stored, whose bytes are a power of two of at most 16, as is what their address divides by.
template <class N, int COUNT>
struct Packed {
  static constexpr int BYTES = COUNT * sizeof(N), WORDS = BYTES < 4 ? 1 : BYTES / 4;
  unsigned words[WORDS];

  __device__ __forceinline__ void clear() {
    for (int i = 0; i < WORDS; ++i) words[i] = 0;
  }

  __device__ __forceinline__ void load(const N* from) {
    if constexpr (BYTES == 16) {
      const uint4 all = *reinterpret_cast<const uint4*>(from);
      words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    } else if constexpr (BYTES == 8) {
      const uint2 all = *reinterpret_cast<const uint2*>(from);
      words[0] = all.x, words[1] = all.y;
    } else if constexpr (BYTES == 4) {
      words[0] = *reinterpret_cast<const unsigned*>(from);
    } else if constexpr (BYTES == 2) {
      words[0] = *reinterpret_cast<const unsigned short*>(from);
    } else {
      words[0] = *reinterpret_cast<const unsigned char*>(from);
    }
  }

  __device__ __forceinline__ void unpack(float* out) const {
    constexpr int PER_WORD = 4 / sizeof(N);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      float numbers[PER_WORD];
      unpack_word<N>(words[i], numbers);
#pragma unroll
      for (int j = 0; j < least(PER_WORD, COUNT); ++j) out[i * PER_WORD + j] = numbers[j];
    }
  }
};
