// This file builds the page bounds from the kept keys.
#include "pages.h"

#include <atomic>

#include "threads.h"

namespace rocketkv {
namespace {

template <class T>
struct Build {
  const Keys& keys;
  const Pages& pages;
  std::atomic<int64_t> next_task{0}, next_head{0};

  void work() {
    int64_t num_tasks = static_cast<int64_t>(keys.batch) * keys.num_kv_heads * pages.num_blocks;
    for (int64_t task; (task = next_task.fetch_add(1)) < num_tasks;)
      build_block(task / pages.num_blocks, task % pages.num_blocks);
  }

  // Blocks are added in order, so that the sums equal those of an index that has grown.
  void sum_spreads() {
    for (int64_t head; (head = next_head.fetch_add(1)) < static_cast<int64_t>(keys.batch) * keys.num_kv_heads;) {
      const int64_t page_size = pages.page_size[head / keys.num_kv_heads], tokens = kPagesPerBlock * page_size;
      const int64_t length = keys.lengths[head];
      const int64_t first_pages = (std::min(length, tokens) + page_size - 1) / page_size;
      add_range<T>(pages, head, 0, static_cast<int>(first_pages), keys.head_dim);
      for (int64_t block = 1; (block + 1) * tokens <= length; ++block)
        add_range<T>(pages, head, block, kPagesPerBlock, keys.head_dim);
    }
  }

  void build_block(int64_t head, int64_t block) {
    int64_t row = head / keys.num_kv_heads, page_size = pages.page_size[row];
    int64_t begin = block * kPagesPerBlock * page_size,
            end = std::min(begin + kPagesPerBlock * page_size, keys.lengths[head]);
    const T* first =
        static_cast<const T*>(keys.keys) + row * keys.batch_stride + head % keys.num_kv_heads * keys.head_stride;
    for (int64_t rank = begin; rank < end; ++rank)
      fold_token(pages, head, page_size, rank, first + rank * keys.head_dim, keys.head_dim);
  }
};

template <class T>
void build(const Keys& keys, const Pages& pages, int num_threads) {
  Build<T> build{keys, pages};
  run_on_threads(num_threads, [](void* self) { static_cast<Build<T>*>(self)->work(); }, &build);
  if (pages.spread)
    run_on_threads(num_threads, [](void* self) { static_cast<Build<T>*>(self)->sum_spreads(); }, &build);
}

}  // namespace

void build_pages(const Keys& keys, const Pages& pages, int num_threads) {
  switch (keys.dtype) {
    case Dtype::kFloat32: return build<float>(keys, pages, num_threads);
    case Dtype::kBfloat16: return build<Bfloat16>(keys, pages, num_threads);
    default: return build<Float16>(keys, pages, num_threads);
  }
}

}  // namespace rocketkv
