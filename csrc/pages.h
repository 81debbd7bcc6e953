// The page bounds: building them, and taking in one more token. See ops/pages.py.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace rocketkv {

// The bounds of one page: row r of it is at [r * kBlockPages].
template <class T>
inline T* page_bounds(const Pages& pages, int64_t head, int64_t page) {
  int64_t block = head * pages.num_blocks + page / kBlockPages;
  return static_cast<T*>(pages.bounds) + block * pages.num_rows * kBlockPages + page % kBlockPages;
}

// Let the page of the token at `place` take in its key, [D]; the first token of a page opens it.
template <class T>
inline void fold_token(const Pages& pages, int64_t head, int64_t page_size, int64_t place, const T* key, int head_dim) {
  T* bounds = page_bounds<T>(pages, head, place / page_size);
  T* maxima = bounds + static_cast<int64_t>(pages.num_rows - head_dim) * kBlockPages;
  const bool opens = place % page_size == 0, has_minima = pages.num_rows > head_dim;
  for (int c = 0; c < head_dim; ++c) {  // without branches: nobody can foresee them
    float x = to_float(key[c]);
    T &most = maxima[c * kBlockPages], &least = bounds[c * kBlockPages];
    most = ((x > to_float(most)) | opens) ? key[c] : most;
    if (has_minima) least = ((x < to_float(least)) | opens) ? key[c] : least;
  }
}

// Add the range of the keys in a block's first `num_pages` to the spread, or let the spread be it.
template <class T>
inline void add_range(const Pages& pages, int64_t head, int64_t block, int num_pages, int head_dim) {
  float* spread = pages.spread + head * head_dim;
  const T* minima = page_bounds<T>(pages, head, block * kBlockPages);
  const T* maxima = minima + static_cast<int64_t>(pages.num_rows - head_dim) * kBlockPages;
  for (int c = 0; c < head_dim; ++c) {
    const float range = range_of(minima + c * kBlockPages, maxima + c * kBlockPages, num_pages);
    spread[c] = block == 0 ? range : spread[c] + range;
  }
}

// Let the spread take in the block that the newest of `length` tokens has filled; before the first one is full, the spread
// is the range of all keys. See ops/pages.py.
template <class T>
inline void extend_spread(const Pages& pages, int64_t head, int64_t page_size, int64_t length, int head_dim) {
  const int64_t tokens = kBlockPages * page_size, block = (length - 1) / tokens, left = length - block * tokens;
  if (block == 0 || left == tokens)
    add_range<T>(pages, head, block, static_cast<int>((left + page_size - 1) / page_size), head_dim);
}

}  // namespace rocketkv
