// A prefetcher, which loads a thread's next data into its cache, little by little, while the thread still computes.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace rocketkv {

// The data that a thread's next task reads first: 32 numbers of T, a cache line in 16 bits, at each address. The
// memory is idle while the present task chooses and attends.
template <class T>
class Prefetcher {
 public:
  void clear() { addresses_.clear(), next_ = 0; }
  void add(const void* address) { addresses_.push_back(address); }

  // Fetch at the next `count` addresses, or at those that are left.
  void fetch(int count) {
    const size_t end = std::min(addresses_.size(), next_ + count);
    for (; next_ < end; ++next_) prefetch(addresses_[next_], 32 * sizeof(T));
  }
  void fetch_all() { fetch(static_cast<int>(addresses_.size())); }

 private:
  std::vector<const void*> addresses_;
  size_t next_ = 0;
};

}  // namespace rocketkv
