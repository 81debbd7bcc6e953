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

}  // namespace rocketkv
