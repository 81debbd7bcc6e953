// The bounds of pages: how a key is taken in, what a block adds to the spread, and how bounds are multiplied. See
// ops/pages.py, which describes the layout.
#pragma once

#include "layer.cuh"
#include "reduce.cuh"

constexpr int PAGES_PER_BLOCK = 32;

// The place of a page's first bound; the next bound of the page is PAGES_PER_BLOCK further.
__device__ __forceinline__ int64 page_start(const Layer& layer, int64 head, int page) {
  return (head * layer.num_blocks + page / PAGES_PER_BLOCK) * (layer.num_rows * PAGES_PER_BLOCK) +
         page % PAGES_PER_BLOCK;
}

// Widen the bounds of a page to include a key, [D]. All threads of a block call this.
__device__ __forceinline__ void fold_key(const Layer& layer, int64 head, int page, const T* key) {
  T* bounds = layer.bounds + page_start(layer, head, page);
  for (int row = threadIdx.x; row < layer.num_rows; row += blockDim.x) {
    T& bound = bounds[row * PAGES_PER_BLOCK];
    const float own = to_float(key[row % D]), earlier = to_float(bound);
    const bool is_maximum = row + D >= layer.num_rows;  // the last D rows are the maxima
    if ((is_maximum ? own > earlier : own < earlier) || own != own) bound = key[row % D];
  }
}

// Let the spread take in the new token. All threads of a block call this. See extend_spread in ops/pages.py.
__device__ __forceinline__ void extend_page_spread(const Layer& layer, const Head& head, int page_size) {
  const int tokens = PAGES_PER_BLOCK * page_size, block = head.rank / tokens;
  if (block > 0 && head.length % tokens) return;
  float* spread = layer.spread + head.index * D;
  const int lane = threadIdx.x % WARP;
  const bool is_page = (block * PAGES_PER_BLOCK + lane) * page_size < head.length;
  const T* minima = layer.bounds + page_start(layer, head.index, block * PAGES_PER_BLOCK) + lane;
  const T* maxima = minima + (layer.num_rows - D) * PAGES_PER_BLOCK;
  for (int c = threadIdx.x / WARP; c < D; c += blockDim.x / WARP) {
    const float low = is_page ? to_float(minima[c * PAGES_PER_BLOCK]) : 0.0f;
    const float high = is_page ? to_float(maxima[c * PAGES_PER_BLOCK]) : 0.0f;
    const float range = range_of_lanes(low, high, is_page);
    if (lane == 0) spread[c] = block == 0 ? range : spread[c] + range;
  }
}

// Multiply the queries, [count][H], with the bounds in `count` rows of a block of pages; a lane gets one page.
template <int H>
__device__ __forceinline__ void page_products(const Layer& layer, const Head& head, int block, int count,
                                              const int* rows, const float* queries, int lane,
                                              float (&products)[2][H]) {
  const T* bounds = layer.bounds + page_start(layer, head.index, block * PAGES_PER_BLOCK) + lane;
#pragma unroll
  for (int h = 0; h < H; ++h) products[0][h] = 0.0f;
#pragma unroll 8
  for (int r = 0; r < count; ++r) {
    const float bound = to_float(bounds[rows[r] * PAGES_PER_BLOCK]);
#pragma unroll
    for (int h = 0; h < H; ++h) products[0][h] += queries[r * H + h] * bound;
  }
}
