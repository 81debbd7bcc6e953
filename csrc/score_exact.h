// Scoring by the logits of the whole keys.
#pragma once

#include "dot.h"
#include "view.h"

namespace rocketkv {
namespace {  // see view.h

template <class T>
struct ExactScoring {
  static constexpr int kUnitsPerBlock = kTile;

  static int64_t page_size(const Layer&, int64_t) { return 1; }
  static const float* spread(const Layer&) { return nullptr; }
  static void append(const Layer&, const HeadTask&, const T*) {}
  static void extend_spread(const Layer&, const HeadTask&) {}
  static void prepare(const View<T>&, const HeadTask&, QueryChannels<T>&) {}
  static void fetch_first(const View<T>&, const HeadTask&, const QueryChannels<T>&, Prefetcher<T>&) {}

  static int64_t score(const View<T>& view, HeadTask& task, const QueryChannels<T>&, int64_t block, int64_t end_block) {
    const int64_t begin = block * kUnitsPerBlock, end = std::min(end_block * kUnitsPerBlock, task.length);
    const int head_dim = view.layer.head_dim, padded = view.padded;
    const Operand<T>* query = view.query_operands(task);
    for (int64_t start = begin; start < end; start += kTile) {
      const T* rows[kTile + 2 * kAhead];
      int n = static_cast<int>(std::min<int64_t>(kTile, end - start));
      for (int i = 0; i < n + 2 * kAhead; ++i)
        rows[i] = view.stored(view.layer.keys, task, view.slot_at(task, std::min(start + i, end - 1)));
      for (int h = 0; h < view.group; h += kMaxHeads)
        with_heads(view.group - h, [&](auto heads) {
          for (int i = 0; i < n; i += rows_at_once(heads)) {
            float out[kSums];
            dot_rows<heads, true>(rows + i, query + h * padded, padded, head_dim, out);
            for (int k = 0; k < heads; ++k)
              for (int j = 0; j < rows_at_once(heads) && i + j < n; ++j)
                task.logits[(h + k) * view.unit_stride + start + i + j] =
                    out[k * rows_at_once(heads) + j] * view.layer.scale;
          }
        });
    }
    return (end - begin) * head_dim * sizeof(T);
  }
};

}  // namespace
}  // namespace rocketkv
