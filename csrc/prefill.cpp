// Exact causal attention of a prompt, in tiles with an online softmax (FlashAttention-2, arXiv:2307.08691).
//
// A task is one KV head of one batch row and some of its last tokens, with all query heads of the KV head. A thread
// draws one task after the other; in each head, those with the most keys come first. The thread packs a tile of keys
// and values into memory of its own, lets all rows of the task attend to it, and goes on to the next tile. So the
// memory does not grow with the prompt, and a tile is read once for all query heads. A row's output does not depend on
// how the work is shared out, because the tiles of a row begin at its first token and every row has sums of its own.
#include <algorithm>
#include <atomic>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "prefill_pack.h"
#include "prefill_product.h"
#include "prefill_softmax.h"
#include "softcap.h"
#include "threads.h"

namespace rocketkv {
namespace {

constexpr int kMostRows = 384;          // rows of a task at most: they and a tile fit in a core's second cache
constexpr int kFewestRows = 48;         // at least, so that packing a tile takes little of the time
constexpr int64_t kTasksPerThread = 8;  // at least, unless rows get too few

// Memory that a thread keeps from prompt to prompt.
struct Memory {
  Buffer keys, values, queries, outputs, scores, weights;
  std::vector<Softmax> softmax;

  static Memory& mine() {
    static thread_local Memory memory;
    return memory;
  }
};

template <class T>
class Prefill {
 public:
  Prefill(const Prompt& prompt, int num_threads)
      : prompt_(prompt),
        num_threads_(num_threads),
        group_(prompt.num_heads / prompt.num_kv_heads),
        padded_(round_up(prompt.head_dim, kPair)),
        num_heads_(static_cast<int64_t>(prompt.batch) * prompt.num_kv_heads) {
    const int64_t rows = prompt.num_tokens * group_, wanted = kTasksPerThread * num_threads;
    const int64_t fitting = std::clamp<int64_t>(rows * num_heads_ / wanted, kFewestRows, kMostRows);
    block_ = std::max<int64_t>(fitting / group_, 1);
    num_blocks_ = (prompt.num_tokens + block_ - 1) / block_;
  }

  void run() {
    run_on_threads(num_threads_, [](void* self) { static_cast<Prefill*>(self)->work(); }, this);
  }

 private:
  using O = Operand<T>;
  static constexpr int kWeightStride = kTileKeys / kDepth<T>;

  void work() {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < num_heads_ * num_blocks_;) {
      const int64_t head = task / num_blocks_, row = head / prompt_.num_kv_heads;
      const int64_t end = prompt_.num_tokens - task % num_blocks_ * block_;
      const int64_t first = prompt_.num_tokens - (prompt_.num_queries ? prompt_.num_queries[row] : prompt_.num_tokens);
      const int64_t begin = std::max<int64_t>({0, first, end - block_, prompt_.num_tokens - prompt_.lengths[head]});
      for (int64_t part = begin; part < end;) {
        int64_t part_end = part + 1;
        while (part_end < end && is_finite(head, visible(head, part_end) - 1)) ++part_end;
        attend(head, part, part_end);
        part = part_end;
      }
    }
  }

  // Return how many of the row's first keys a token sees.
  int64_t visible(int64_t head, int64_t token) const {
    return prompt_.lengths[head] - (prompt_.num_tokens - 1 - token);
  }

  // Return the key or the value in a head's slot.
  const T* stored(const Rows& rows, int64_t head, int64_t slot) const {
    return rows.at<T>(head / prompt_.num_kv_heads, head % prompt_.num_kv_heads, slot);
  }

  // Return whether a slot's value is finite. Where not, the slot's first token begins a part of its own: a weight of
  // zero would not keep the value from the tokens before, which do not see the slot.
  bool is_finite(int64_t head, int64_t slot) const {
    if (slot < 0) return true;
    const T* value = stored(prompt_.values, head, slot);
    Vec products = {};
    for (int c = 0; c < prompt_.head_dim; c += kPair) {
      const Part<T> part(value + c, std::min(kPair, prompt_.head_dim - c));
      const Pair pair = load_pair(part.numbers);
      products += pair.a * 0.0f + pair.b * 0.0f;
    }
    return sum_lane(products) == 0;
  }

  // Let the tokens from `begin` to `end` attend, in all query heads of a KV head.
  void attend(int64_t head, int64_t begin, int64_t end) {
    const int rows = static_cast<int>(end - begin) * group_, num_groups = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
    const int dim = prompt_.head_dim, steps = (dim + kDepth<T> - 1) / kDepth<T>, steps_stride = padded_ / kDepth<T>;
    const int query_stride = steps_stride * kRowsAtOnce, output_stride = padded_ * kRowsAtOnce;
    Memory& mine = Memory::mine();
    float* queries = mine.queries.resize(static_cast<size_t>(num_groups) * query_stride);
    float* outputs = mine.outputs.resize(static_cast<size_t>(num_groups) * output_stride);
    float* keys = mine.keys.resize(static_cast<size_t>(kTileKeys) * steps_stride);
    float* values = mine.values.resize(static_cast<size_t>(kWeightStride) * padded_);
    float* scores = mine.scores.resize(kRowsAtOnce * kTileKeys);
    float* weights = mine.weights.resize(kRowsAtOnce * kWeightStride);
    std::fill_n(outputs, static_cast<size_t>(num_groups) * output_stride, 0.0f);
    std::fill_n(queries + (num_groups - 1) * query_stride, query_stride, 0.0f);
    mine.softmax.assign(rows, Softmax());
    for (int r = 0; r < rows; ++r)
      pack_query(query(head, begin, r), dim, queries + r / kRowsAtOnce * query_stride + r % kRowsAtOnce);

    // A capped score is tanh of a dot product, and its logit is softcap times that.
    const float softcap = prompt_.terms.softcap, *sinks = prompt_.terms.sink_logits;
    const float factor = power_of_two_factor(softcap > 0 ? softcap : prompt_.scale);
    const int64_t num_keys = visible(head, end - 1);
    for (int64_t slot = 0; slot < num_keys; slot += kTileKeys) {
      const int count = static_cast<int>(std::min<int64_t>(kTileKeys, num_keys - slot));
      pack_keys(stored(prompt_.keys, head, slot), prompt_.keys.token_stride, count, dim, padded_, keys);
      pack_values(stored(prompt_.values, head, slot), prompt_.values.token_stride, count, dim, padded_, values);
      for (int g = 0; g < num_groups; ++g) {
        const int first = g * kRowsAtOnce, last = std::min(first + kRowsAtOnce, rows) - 1;
        const int seen = static_cast<int>(std::min<int64_t>(visible(head, begin + last / group_) - slot, count));
        if (seen <= 0) continue;
        multiply_keys<O, kTileKeys>(queries + g * query_stride, keys, steps, steps_stride, seen, scores);
        float shrink[kRowsAtOnce] = {};
        for (int r = first; r <= last; ++r) {
          const int own = static_cast<int>(std::min<int64_t>(visible(head, begin + r / group_) - slot, seen));
          const int i = r - first;
          if (softcap > 0) cap(scores + i * kTileKeys, own, prompt_.scale / softcap, 1.0f);
          shrink[i] = mine.softmax[r].weigh(scores + i * kTileKeys, own, seen, factor,
                                            reinterpret_cast<O*>(weights + i * kWeightStride));
        }
        add_weighted_values<O, kWeightStride>(weights, values, (seen + kDepth<T> - 1) / kDepth<T>, dim, padded_, shrink,
                                              outputs + g * output_stride);
      }
    }
    for (int r = 0; r < rows; ++r) {
      const float* sums = outputs + r * padded_;
      T* output = const_cast<T*>(row_at(prompt_.output, head, begin, r));
      const float sink = sinks ? sinks[query_head(head, r)] * kLog2e : Softmax::kLeast;
      const float weight = mine.softmax[r].normalizer(factor, sink);
      for (int c = 0; c < dim; ++c) output[c] = from_float<T>(sums[c] * weight);
    }
  }

  // Return a row of a task: row r is token begin + r / group_, in query head r % group_ of the KV head.
  const T* row_at(const Rows& rows, int64_t head, int64_t begin, int r) const {
    return rows.at<T>(head / prompt_.num_kv_heads, query_head(head, r), begin + r / group_);
  }
  int64_t query_head(int64_t head, int r) const { return head % prompt_.num_kv_heads * group_ + r % group_; }
  const T* query(int64_t head, int64_t begin, int r) const { return row_at(prompt_.query, head, begin, r); }

  const Prompt& prompt_;
  const int num_threads_, group_, padded_;
  const int64_t num_heads_;     // KV heads of all rows
  int64_t block_, num_blocks_;  // tokens of a task, and tasks of a head
  std::atomic<int64_t> next_{0};
};

}  // namespace

void prefill(const Prompt& prompt, int num_threads) {
  switch (prompt.dtype) {
    case Dtype::kFloat32: return Prefill<float>(prompt, num_threads).run();
    case Dtype::kBfloat16: return Prefill<Bfloat16>(prompt, num_threads).run();
    default: return Prefill<Float16>(prompt, num_threads).run();
  }
}

}  // namespace rocketkv
