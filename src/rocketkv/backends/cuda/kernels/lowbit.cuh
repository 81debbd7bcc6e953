// The keys in 4 bits: how a token is taken in, what a group adds to the spread, and how the codes are read. See
// ops/lowbit.py, which describes the layout.
#pragma once

#include "layer.cuh"
#include "reduce.cuh"

constexpr int GROUP = 64;  // tokens that share a least value and a step
constexpr int GROUPS_PER_BLOCK = 16;
constexpr int HALF = GROUP / 2;  // tokens whose codes are the low halves of bytes
constexpr float LEVELS = 15.0f;

// The place of channel 0 of a group, counted in groups of one channel; the next channel is GROUPS_PER_BLOCK further.
__device__ __forceinline__ int64 group_start(const Layer& layer, int64 head, int group) {
  return (head * layer.num_blocks + group / GROUPS_PER_BLOCK) * (D * GROUPS_PER_BLOCK) + group % GROUPS_PER_BLOCK;
}

__device__ __forceinline__ int code_of(float key, float low, float step) {
  const float steps = rintf((key - low) / step);
  return steps > 0.0f ? static_cast<int>(fminf(steps, LEVELS)) : 0;  // 0 / 0 is NaN where all keys are alike
}

// Quantize the open group of a head. All threads of a block call this, and each takes whole channels.
__device__ __forceinline__ void close_group(const Layer& layer, int64 head, int group) {
  for (int c = threadIdx.x; c < D; c += blockDim.x) {
    const T* keys = layer.open_keys + (head * D + c) * GROUP;
    float low = to_float(keys[0]), high = low;
    for (int i = 1; i < GROUP; ++i) {
      const float x = to_float(keys[i]);
      low = x < low || x != x ? x : low;  // a NaN stays
      high = x > high || x != x ? x : high;
    }
    const T stored = from_float<T>((high - low) / LEVELS);
    const float step = to_float(stored);
    const int64 at = group_start(layer, head, group) + static_cast<int64>(c) * GROUPS_PER_BLOCK;
    layer.ranges[2 * at] = from_float<T>(low);
    layer.ranges[2 * at + 1] = stored;
    for (int i = 0; i < HALF; ++i)
      layer.codes[at * HALF + i] = static_cast<unsigned char>(code_of(to_float(keys[i]), low, step) |
                                                              code_of(to_float(keys[i + HALF]), low, step) << 4);
  }
}

// Let the open group take in a key, [D], and close the group if that fills it. All threads of a block call this.
__device__ __forceinline__ void append_lowbit(const Layer& layer, const Head& head, const T* key) {
  for (int c = threadIdx.x; c < D; c += blockDim.x)
    layer.open_keys[(head.index * D + c) * GROUP + head.rank % GROUP] = key[c];
  if (head.length % GROUP) return;
  __syncthreads();
  close_group(layer, head.index, head.rank / GROUP);
}

// Let the spread take in the new token. All threads of a block call this. See append_lowbit in ops/lowbit.py.
__device__ __forceinline__ void extend_lowbit_spread(const Layer& layer, const Head& head) {
  float* spread = layer.spread + head.index * D;
  if (head.length % GROUP == 0) {
    const int64 first = group_start(layer, head.index, head.rank / GROUP);
    for (int c = threadIdx.x; c < D; c += blockDim.x) {
      const float step = to_float(layer.ranges[2 * (first + static_cast<int64>(c) * GROUPS_PER_BLOCK) + 1]);
      spread[c] = head.length == GROUP ? step : spread[c] + step;
    }
  } else if (head.length < GROUP) {
    const int lane = threadIdx.x % WARP;
    for (int c = threadIdx.x / WARP; c < D; c += blockDim.x / WARP) {
      const T* keys = layer.open_keys + (head.index * D + c) * GROUP;
      const bool is_early = lane < head.length, is_late = lane + HALF < head.length;
      const float early = is_early ? to_float(keys[lane]) : 0.0f, late = is_late ? to_float(keys[lane + HALF]) : early;
      const bool is_broken = late != late;  // fminf and fmaxf skip NaN
      const float range = range_of_lanes(is_broken ? late : fminf(early, late), fmaxf(early, late), is_early);
      if (lane == 0) spread[c] = range;
    }
  }
}

// Multiply the queries with the keys of a group along `count` channels; a lane gets two tokens, HALF apart. `queries`
// is [count][H], and `weights` is memory of the warp of the same size.
template <int H>
__device__ __forceinline__ void lowbit_products(const Layer& layer, const Head& head, int group, int count,
                                                const int* channels, const float* queries, float* weights, int lane,
                                                float (&products)[2][H]) {
#pragma unroll
  for (int h = 0; h < H; ++h) products[0][h] = products[1][h] = 0.0f;
  if (head.length < (group + 1) * GROUP) {  // the open group, whose keys are stored as they came
    const T* keys = layer.open_keys + head.index * D * GROUP + lane;
#pragma unroll 4
    for (int r = 0; r < count; ++r) {
      const float early = to_float(keys[channels[r] * GROUP]), late = to_float(keys[channels[r] * GROUP + HALF]);
#pragma unroll
      for (int h = 0; h < H; ++h) {
        products[0][h] += queries[r * H + h] * early;
        products[1][h] += queries[r * H + h] * late;
      }
    }
    return;
  }
  // A key is low + step * code: each channel adds q * low to all logits, and the weights of its codes are q * step.
  const int64 first = group_start(layer, head.index, group);
  float offsets[H];
#pragma unroll
  for (int h = 0; h < H; ++h) offsets[h] = 0.0f;
  for (int r = lane; r < count; r += WARP) {
    float range[2];
    Packed<T, 2> stored;
    stored.load(layer.ranges + 2 * (first + channels[r] * GROUPS_PER_BLOCK));
    stored.unpack(range);
#pragma unroll
    for (int h = 0; h < H; ++h) {
      const float query = queries[r * H + h], weight = query * range[1];
      offsets[h] += query * range[0];
      weights[r * H + h] = is_same<T, BFloat16> ? to_float(from_float<BFloat16>(weight)) : weight;
    }
  }
#pragma unroll
  for (int h = 0; h < H; ++h) offsets[h] = sum_lanes(offsets[h]);
  __syncwarp();
  const unsigned char* codes = layer.codes + first * HALF + lane;
#pragma unroll 8
  for (int r = 0; r < count; ++r) {
    const unsigned byte = codes[channels[r] * (GROUPS_PER_BLOCK * HALF)];
    const float early = byte & 15u, late = byte >> 4;
#pragma unroll
    for (int h = 0; h < H; ++h) {
      products[0][h] += weights[r * H + h] * early;
      products[1][h] += weights[r * H + h] * late;
    }
  }
#pragma unroll
  for (int h = 0; h < H; ++h) products[0][h] += offsets[h], products[1][h] += offsets[h];
  __syncwarp();  // the next group's weights take the place of these
}
