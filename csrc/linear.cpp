// Products of few rows with a weight matrix: a decode step's linear layers, which are nothing but reading the weights.
#include <atomic>
#include <vector>

#include "dot.h"
#include "kernels.h"
#include "threads.h"

namespace rocketkv {
namespace {

constexpr int64_t kChunk = 16;       // weight rows of a task at least
constexpr int64_t kTasksPerThread = 4;

template <class W, class X>
struct Product {
  const Linear& linear;
  int64_t chunk, padded;
  std::vector<float> input;  // [num_rows][padded] in the order of W
  std::atomic<int64_t> next_chunk{0};

  Product(const Linear& linear, int num_threads)
      : linear(linear),
        chunk(std::max(kChunk, linear.num_out / (num_threads * kTasksPerThread) / kChunk * kChunk)),
        padded(round_up(static_cast<int>(linear.num_in), kPair)),
        input(linear.num_rows * padded) {
    const X* x = static_cast<const X*>(linear.input);
    for (int64_t m = 0; m < linear.num_rows; ++m)
      spread<W>(x + m * linear.num_in, static_cast<int>(linear.num_in), input.data() + m * padded);
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
    const W* weight = static_cast<const W*>(linear.weight);
    X* output = static_cast<X*>(linear.output);
    for (int64_t row = begin; row < end; row += N) {
      const W* rows[N + kAhead];
      for (int i = 0; i < N + kAhead; ++i) rows[i] = weight + std::min(row + i, end - 1) * linear.num_in;
      float sums[8];
      dot_rows<H, true>(rows, input.data() + first * padded, static_cast<int>(padded), static_cast<int>(linear.num_in), sums);
      for (int i = 0; i < N && row + i < end; ++i) {
        float scale = linear.scales ? linear.scales[row + i] : 1.0f;
        for (int h = 0; h < H; ++h)
          output[(first + h) * linear.num_out + row + i] = from_float<X>(sums[i * H + h] * scale);
      }
    }
  }
};

template <class W, class X>
void run_product(const Linear& linear, int num_threads) {
  Product<W, X> product(linear, num_threads);
  run_on_threads(num_threads, [](void* self) { static_cast<Product<W, X>*>(self)->work(); }, &product);
}

template <class X>
void with_weights(const Linear& linear, int num_threads) {
  return linear.weight_dtype == Dtype::kInt8 ? run_product<int8_t, X>(linear, num_threads) : run_product<X, X>(linear, num_threads);
}

}  // namespace

void multiply(const Linear& linear, int num_threads) {
  switch (linear.dtype) {
    case Dtype::kFloat32: return with_weights<float>(linear, num_threads);
    case Dtype::kBfloat16: return with_weights<Bfloat16>(linear, num_threads);
    default: return with_weights<Float16>(linear, num_threads);
  }
}

}  // namespace rocketkv
