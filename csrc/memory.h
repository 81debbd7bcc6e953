// Advice to the operating system about the memory of a buffer.
#pragma once

#include <cstddef>

namespace rocketkv {

// Ask for huge pages where a buffer that nothing was written to covers any. Chosen tokens and channels lie scattered,
// and with small pages every one of them costs a walk through the page tables besides the read itself.
void use_huge_pages(void* begin, size_t num_bytes);

}  // namespace rocketkv
