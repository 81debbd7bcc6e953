// Keys and values in 8 bits. See ops/int8.py.
#pragma once

#include "reduce.cuh"

constexpr int STEP_CHANNELS = 32;
constexpr int NUM_STEPS = (D + STEP_CHANNELS - 1) / STEP_CHANNELS;

// The step of an exponent, a power of two. For NOT_FINITE, -128, it is minus infinity, which makes NaN of a code of 0.
__device__ __forceinline__ float step_of(int exponent) {
  return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
}

// Quantize and store the STEP_CHANNELS channels from `first` on of a row, one a lane; return a lane's number as later
// steps will read it.
__device__ __forceinline__ T store_in_8_bits(const T* row, int first, int lane, signed char* codes,
                                             signed char* exponents) {
  const int channel = first + lane;
  const float x = channel < D ? to_float(row[channel]) : 0.0f;
  const int raised = most_of_lanes(ordered(x)) >> 23;
  const bool is_finite = raised < 255;
  const int exponent = is_finite ? max(raised - (127 + 6), is_same<T, Float16> ? -24 : -126) : -128;
  const float step = step_of(exponent);
  const float code = is_finite ? fminf(fmaxf(rintf(x / step), -127.0f), 127.0f) : 0.0f;
  if (channel < D) codes[channel] = static_cast<signed char>(code);
  if (lane == 0) exponents[first / STEP_CHANNELS] = static_cast<signed char>(exponent);
  return from_float<T>(code * step);
}
