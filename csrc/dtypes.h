// The types in which keys, values and weights are stored, and one number of each.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace rocketkv {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
#if defined(__aarch64__)
using Half = __fp16;  // as _Float16, which GCC's C++ has from version 13 on
#elif !defined(__F16C__)
using Half = _Float16;
#endif

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return load<float>(&bits);
}
inline float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  return static_cast<float>(load<Half>(&x));
#endif
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Bfloat16 from_float<Bfloat16>(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits = load<uint32_t>(&x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  Half half = static_cast<Half>(x);
  return load<Float16>(&half);
#endif
}

}  // namespace rocketkv
