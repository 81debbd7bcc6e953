#include "memory.h"

#include <sys/mman.h>

#include <cstdint>

namespace rocketkv {

void use_huge_pages(void* begin, size_t num_bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage,
            last = (address + num_bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // without it, only slower
#else
  (void)begin, (void)num_bytes;
#endif
}

}  // namespace rocketkv
