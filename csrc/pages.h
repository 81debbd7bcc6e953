// The index of page bounds: where they lie, and how they take in one more token. See ops/pages.py.
#pragma once

#include "kernels.h"
#include "pairs.h"

namespace rocketkv {

// The bounds of one page: row r is at [r * kPagesPerBlock].
template <class T>
inline T* page_bounds(const Pages& pages, int64_t head, int64_t page) {
  int64_t block = head * pages.num_blocks + page / kPagesPerBlock;
  return static_cast<T*>(pages.bounds) + block * pages.num_rows * kPagesPerBlock + page % kPagesPerBlock;
}

// Let the page of the token of rank `rank` take in the token's key, [D]. The first token of a page opens the page.
template <class T>
inline void fold_token(const Pages& pages, int64_t head, int64_t page_size, int64_t rank, const T* key, int head_dim) {
  T* bounds = page_bounds<T>(pages, head, rank / page_size);
  T* maxima = bounds + static_cast<int64_t>(pages.num_rows - head_dim) * kPagesPerBlock;
  const bool opens = rank % page_size == 0, has_minima = pages.num_rows > head_dim;
  for (int c = 0; c < head_dim; ++c) {  // without branches, which the CPU could not predict
    float x = to_float(key[c]);
    T &most = maxima[c * kPagesPerBlock], &least = bounds[c * kPagesPerBlock];
    most = ((x > to_float(most)) | opens) ? key[c] : most;
    if (has_minima) least = ((x < to_float(least)) | opens) ? key[c] : least;
  }
}

// Add the range of the keys in a block's first `num_pages` pages to the spread; the first block's range replaces it.
template <class T>
inline void add_range(const Pages& pages, int64_t head, int64_t block, int num_pages, int head_dim) {
  float* spread = pages.spread + head * head_dim;
  const T* minima = page_bounds<T>(pages, head, block * kPagesPerBlock);
  const T* maxima = minima + static_cast<int64_t>(pages.num_rows - head_dim) * kPagesPerBlock;
  for (int c = 0; c < head_dim; ++c) {
    const float range = range_of(minima + c * kPagesPerBlock, maxima + c * kPagesPerBlock, num_pages);
    spread[c] = block == 0 ? range : spread[c] + range;
  }
}

// Let the spread take in the block that the newest of `length` tokens has filled. Before the first block is full, the
// spread is the range of all keys. See ops/pages.py.
template <class T>
inline void extend_spread(const Pages& pages, int64_t head, int64_t page_size, int64_t length, int head_dim) {
  const int64_t tokens = kPagesPerBlock * page_size, block = (length - 1) / tokens, left = length - block * tokens;
  if (block == 0 || left == tokens)
    add_range<T>(pages, head, block, static_cast<int>((left + page_size - 1) / page_size), head_dim);
}

}  // namespace rocketkv
