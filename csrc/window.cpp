// Stage 1's scores: the weights that a prompt's last queries give to each token. See score_window in ops/scores.py.
//
// A task is one KV head of one batch row and some of its keys, a part. Every part is visited twice. At first a query's
// largest logit in the part is found, and the sum of its weights relative to that; what a query has found in all parts
// is then joined, and at the second visit its weights become scores. So no logits are kept but those of a tile, and the
// memory hardly grows with the prompt.
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

constexpr int64_t kPartKeys = 4 * kTileKeys;

template <class T>
class Window {
 public:
  Window(const Prompt& prompt, bool by_peak, float* scores, int64_t num_slots)
      : prompt_(prompt),
        by_peak_(by_peak),
        scores_(scores),
        num_slots_(num_slots),
        group_(prompt.num_heads / prompt.num_kv_heads),
        num_heads_(static_cast<int64_t>(prompt.batch) * prompt.num_kv_heads),
        num_parts_((num_slots + kPartKeys - 1) / kPartKeys),
        num_rows_(prompt.num_tokens * group_),
        found_(num_heads_ * num_parts_ * num_rows_) {}

  void run(int num_threads) {
    run_on_threads(num_threads, [](void* self) { static_cast<Window*>(self)->visit_parts<false>(); }, this);
    join();
    next_ = 0;
    run_on_threads(num_threads, [](void* self) { static_cast<Window*>(self)->visit_parts<true>(); }, this);
  }

 private:
  using O = Operand<T>;

  // Memory that a thread keeps from window to window.
  struct Memory {
    Buffer keys, queries, logits, weights;

    static Memory& mine() {
      static thread_local Memory memory;
      return memory;
    }
  };

  template <bool kScores>
  void visit_parts() {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < num_heads_ * num_parts_;)
      visit<kScores>(task / num_parts_, task % num_parts_);
  }

  // Visit a part of a head's keys, to score them or, before that, to find what its queries' weights are relative to.
  template <bool kScores>
  void visit(int64_t head, int64_t part) {
    const int64_t begin = part * kPartKeys, end = std::min(begin + kPartKeys, prompt_.lengths[head]);
    const int dim = prompt_.head_dim, padded = round_up(dim, kPair), steps = (dim + kDepth<T> - 1) / kDepth<T>;
    const int steps_stride = padded / kDepth<T>, query_stride = steps_stride * kRowsAtOnce;
    const int64_t num_groups = (num_rows_ + kRowsAtOnce - 1) / kRowsAtOnce;
    if (begin >= end) return;
    Memory& mine = Memory::mine();
    float* keys = mine.keys.resize(static_cast<size_t>(kTileKeys) * steps_stride);
    float* logits = mine.logits.resize(kRowsAtOnce * kTileKeys);
    float* weights = mine.weights.resize(kTileKeys);
    float* queries = mine.queries.resize(static_cast<size_t>(num_groups) * query_stride);
    std::fill_n(queries + (num_groups - 1) * query_stride, query_stride, 0.0f);
    for (int64_t r = 0; r < num_rows_; ++r)
      pack_query(query(head, r), dim, queries + r / kRowsAtOnce * query_stride + r % kRowsAtOnce);

    for (int64_t slot = begin; slot < end; slot += kTileKeys) {
      const int count = static_cast<int>(std::min<int64_t>(kTileKeys, end - slot));
      pack_keys(key(head, slot), prompt_.keys.token_stride, count, dim, padded, keys);
      for (int64_t first = 0; first < num_rows_; first += kRowsAtOnce) {
        const int64_t after = std::min<int64_t>(first + kRowsAtOnce, num_rows_);
        const int seen = visible(head, after - 1, slot, count);
        if (seen == 0) continue;
        multiply_keys<O, kTileKeys>(queries + first / kRowsAtOnce * query_stride, keys, steps, steps_stride, seen,
                                    logits);
        for (int64_t r = first; r < after; ++r) {
          float* own = logits + (r - first) * kTileKeys;
          const int num_visible = visible(head, r, slot, count);
          if (softcap_ > 0) cap(own, num_visible, prompt_.scale / softcap_, 1.0f);  // tanh, and factor_ has the rest
          if constexpr (kScores) {
            score(own, num_visible, found(head, 0, r), sink(head, r), scores_ + head * num_slots_ + slot);
          } else {
            found(head, part, r).weigh(own, num_visible, seen, factor_, weights);
          }
        }
      }
    }
  }

  // Join what each query has found in the parts of a head's keys, into what it has found in the first.
  void join() {
    for (int64_t head = 0; head < num_heads_; ++head)
      for (int64_t r = 0; r < num_rows_; ++r) {
        Softmax all;
        for (int64_t part = 0; part < num_parts_; ++part)
          all.largest = std::max(all.largest, found(head, part, r).largest);
        for (int64_t part = 0; part < num_parts_; ++part) {
          const Softmax& some = found(head, part, r);
          if (some.sum != 0) all.sum += some.sum * std::exp2((some.largest - all.largest) * factor_);
        }
        found(head, 0, r) = all;
      }
  }

  // Let the first `count` of some scores take in a query's weights. A query whose softmax is no number has none.
  void score(const float* logits, int count, const Softmax& softmax, float sink, float* scores) const {
    if (!(softmax.sum > 0)) return;
    const Vec largest = broadcast(softmax.largest), share = broadcast(softmax.normalizer(factor_, sink));
    auto take = [&](const float* logit, float* score) {
      const Vec weight = exp2_of_negative<float>((load<Vec>(logit) - largest) * factor_) * share;
      const Vec before = load<Vec>(score);
      store(score, by_peak_ ? max(weight, before) : before + weight);
    };
    int j = 0;
    for (; j + kWidth <= count; j += kWidth) take(logits + j, scores + j);
    if (j == count) return;
    float last[kWidth] = {};
    std::copy_n(scores + j, count - j, last);
    take(logits + j, last);
    std::copy_n(last, count - j, scores + j);
  }

  // Return how many of `count` keys from `slot` on a row sees; none if the row is padding.
  int visible(int64_t head, int64_t r, int64_t slot, int count) const {
    const int64_t from_end = prompt_.num_tokens - 1 - r / group_;
    if (from_end >= prompt_.num_queries[head / prompt_.num_kv_heads]) return 0;
    return static_cast<int>(std::clamp<int64_t>(prompt_.lengths[head] - from_end - slot, 0, count));
  }

  // Row r is column r / group_ of the window, in query head r % group_ of the KV head.
  const T* query(int64_t head, int64_t r) const {
    return prompt_.query.at<T>(head / prompt_.num_kv_heads, query_head(head, r), r / group_);
  }
  int64_t query_head(int64_t head, int64_t r) const { return head % prompt_.num_kv_heads * group_ + r % group_; }
  float sink(int64_t head, int64_t r) const {
    return prompt_.terms.sink_logits ? prompt_.terms.sink_logits[query_head(head, r)] * kLog2e : Softmax::kLeast;
  }
  const T* key(int64_t head, int64_t slot) const {
    return prompt_.keys.at<T>(head / prompt_.num_kv_heads, head % prompt_.num_kv_heads, slot);
  }
  Softmax& found(int64_t head, int64_t part, int64_t r) { return found_[(head * num_parts_ + part) * num_rows_ + r]; }

  const Prompt& prompt_;
  const bool by_peak_;
  float* const scores_;
  const int64_t num_slots_;
  const int group_;
  const int64_t num_heads_, num_parts_, num_rows_;  // KV heads of all rows; parts of a head; queries of a head
  const float softcap_ = prompt_.terms.softcap, factor_ = power_of_two_factor(softcap_ > 0 ? softcap_ : prompt_.scale);
  std::vector<Softmax> found_;  // [heads][parts][rows]
  std::atomic<int64_t> next_{0};
};

}  // namespace

void score_window(const Prompt& prompt, bool by_peak, float* scores, int64_t num_slots, int num_threads) {
  switch (prompt.dtype) {
    case Dtype::kFloat32: return Window<float>(prompt, by_peak, scores, num_slots).run(num_threads);
    case Dtype::kBfloat16: return Window<Bfloat16>(prompt, by_peak, scores, num_slots).run(num_threads);
    default: return Window<Float16>(prompt, by_peak, scores, num_slots).run(num_threads);
  }
}

}  // namespace rocketkv
