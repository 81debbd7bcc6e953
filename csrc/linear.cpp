// Products of few rows with a weight matrix, as in a decode step, where reading the weights takes most of the time.
#include <atomic>
#include <vector>

#include "dot.h"
#include "kernels.h"
#include "threads.h"

namespace rocketkv {
namespace {

constexpr int64_t kChunk = 16;  // fewest weight rows of a task
constexpr int64_t kTasksPerThread = 4;

template <class T>
struct Product {
  const Linear& linear;
  int64_t chunk, padded;
  std::vector<Operand<T>> input;  // [num_rows][padded]
  std::atomic<int64_t> next_chunk{0};

  Product(const Linear& linear, int num_threads)
      : linear(linear),
        chunk(std::max(kChunk, linear.num_out / (num_threads * kTasksPerThread) / kChunk * kChunk)),
        padded(round_up(static_cast<int>(linear.num_in), kPair)),
        input(linear.num_rows * padded) {
    const T* x = static_cast<const T*>(linear.input);
    for (int64_t m = 0; m < linear.num_rows; ++m)
      prepare_operands<T>(x + m * linear.num_in, static_cast<int>(linear.num_in), input.data() + m * padded);
  }

  void work() {
    for (int64_t begin; (begin = next_chunk.fetch_add(chunk)) < linear.num_out;)
      for (int64_t m = 0; m < linear.num_rows; m += kMaxHeads)
        with_heads(static_cast<int>(linear.num_rows - m),
                   [&](auto rows) { multiply_rows<rows>(m, begin, std::min(begin + chunk, linear.num_out)); });
  }

  template <int H>
  void multiply_rows(int64_t first, int64_t begin, int64_t end) {
    constexpr int N = rows_at_once(H);
    const T* weight = static_cast<const T*>(linear.weight);
    T* output = static_cast<T*>(linear.output);
    for (int64_t row = begin; row < end; row += N) {
      const T* rows[N + kAhead];
      for (int i = 0; i < N + kAhead; ++i) rows[i] = weight + std::min(row + i, end - 1) * linear.num_in;
      float sums[kSums];
      dot_rows<H, true>(rows, input.data() + first * padded, static_cast<int>(padded), static_cast<int>(linear.num_in),
                        sums);
      for (int i = 0; i < N && row + i < end; ++i)
        for (int h = 0; h < H; ++h) output[(first + h) * linear.num_out + row + i] = from_float<T>(sums[h * N + i]);
    }
  }
};

template <class T>
void run_product(const Linear& linear, int num_threads) {
  Product<T> product(linear, num_threads);
  run_on_threads(num_threads, [](void* self) { static_cast<Product<T>*>(self)->work(); }, &product);
}

}  // namespace

void multiply(const Linear& linear, int num_threads) {
  switch (linear.dtype) {
    case Dtype::kFloat32: return run_product<float>(linear, num_threads);
    case Dtype::kBfloat16: return run_product<Bfloat16>(linear, num_threads);
    default: return run_product<Float16>(linear, num_threads);
  }
}

}  // namespace rocketkv
