// The fastest that this processor multiplies bfloat16 numbers: independent products that read no memory.
//
// g++ -O3 -march=native -pthread benchmarks/peak.cpp -o build/peak && build/peak
#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

constexpr int kSums = 12;  // as many as hide the latency of a product
constexpr long kRounds = 100'000'000;
constexpr int kOperations = 64;  // of one product: 32 multiplications and as many additions

// Return the total of the sums, so that the compiler keeps the products.
__attribute__((noinline)) float multiply() {
  __m512 sums[kSums];
  for (int i = 0; i < kSums; ++i)
    sums[i] = _mm512_set1_ps(static_cast<float>(i));                              // all different, so all are computed
  __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80)), b = a;  // ones
  for (long round = 0; round < kRounds; ++round) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 12
    for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, a, b);
  }
  float total = 0;
  for (const auto& sum : sums) total += _mm512_reduce_add_ps(sum);
  return total;
}

int main() {
  for (unsigned count = 1; count <= std::thread::hardware_concurrency(); count *= 2) {
    std::vector<float> totals(count);
    std::vector<std::thread> threads;
    const auto start = std::chrono::steady_clock::now();
    for (auto& total : totals) threads.emplace_back([&total] { total = multiply(); });
    for (auto& thread : threads) thread.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%u threads: %.0f GFLOP/s\n", count, count * 1e-9 * kRounds * kSums * kOperations / seconds);
  }
}
