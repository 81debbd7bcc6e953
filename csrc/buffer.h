// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <vector>

namespace rocketkv {

// Floats that begin at a cache line.
class Buffer {
 public:
  // Return room for `count` floats; what was in the buffer before is lost.
  float* resize(size_t count) {
    if (numbers_.size() < count + kLine) numbers_ = std::vector<float>(count + kLine);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(numbers_.data());
    return numbers_.data() + (kLine - begin / sizeof(float) % kLine) % kLine;
  }

 private:
  static constexpr size_t kLine = 64 / sizeof(float);
  std::vector<float> numbers_;
};

}  // namespace rocketkv
