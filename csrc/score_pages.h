// Scoring by the bounds of pages: along the query's largest channels (RocketKV, SparQ), or along all of them (Quest).
#pragma once

#include "dot.h"
#include "pages.h"
#include "view.h"

namespace rocketkv {
namespace {  // see view.h

constexpr int kBlocksAhead = 2;  // blocks of pages between a prefetch and its use

// The base of both scorings. The rows of QueryChannels are offsets within a block of pages.
template <class T>
struct BlockScoring {
  static constexpr int kUnitsPerBlock = kPagesPerBlock;

  static int64_t page_size(const Layer& layer, int64_t row) { return layer.pages.page_size[row]; }
  static const float* spread(const Layer& layer) { return layer.pages.spread; }

  static void append(const Layer& layer, const HeadTask& task, const T* key) {
    if (layer.pages.bounds)
      fold_token(layer.pages, task.index, page_size(layer, task.row), task.length - 1, key, layer.head_dim);
  }
  static void extend_spread(const Layer& layer, const HeadTask& task) {
    if (layer.pages.bounds && layer.pages.spread)
      rocketkv::extend_spread<T>(layer.pages, task.index, page_size(layer, task.row), task.length, layer.head_dim);
  }

  // What is read first: the first blocks that are scored, and the block that takes in the new token.
  static void fetch_first(const View<T>& view, const HeadTask& task, const QueryChannels<T>& channels,
                          Prefetcher<T>& prefetcher) {
    const int64_t last = (task.num_units - 1) / kPagesPerBlock;
    for (int64_t block = 0; block < std::min<int64_t>(kBlocksAhead, last + 1); ++block)
      for (int row : channels.rows)
        prefetcher.add(page_bounds<T>(view.layer.pages, task.index, block * kPagesPerBlock) + row);
    const T* open = page_bounds<T>(view.layer.pages, task.index, last * kPagesPerBlock);
    for (int r = 0; r < view.layer.pages.num_rows; ++r) prefetcher.add(open + r * kPagesPerBlock);
  }

  static int64_t score(const View<T>& view, HeadTask& task, const QueryChannels<T>& channels, int64_t begin,
                       int64_t end) {
    for (int64_t block = begin; view.is_shared && block < std::min(begin + kBlocksAhead, end); ++block) {
      const T* bounds = page_bounds<T>(view.layer.pages, task.index, block * kPagesPerBlock);
      for (int row : channels.rows) prefetch(bounds + row, kPagesPerBlock * sizeof(T));
    }
    auto score_chunks = [&](auto chunks, int64_t page) {
      for (int h = 0; h < view.group; h += kMaxHeads)
        with_heads(view.group - h,
                   [&](auto heads) { score_pages<heads, chunks>(view, task, channels, h, page, h == 0 ? end : 0); });
    };
    int64_t page = begin * kPagesPerBlock;
    for (; page + kChunks * kPair <= end * kPagesPerBlock; page += kChunks * kPair)
      score_chunks(std::integral_constant<int, kChunks>(), page);
    for (; page < end * kPagesPerBlock; page += kPair) score_chunks(std::integral_constant<int, 1>(), page);
    const int64_t num_pages = std::min(end * kPagesPerBlock, task.num_units) - begin * kPagesPerBlock;
    return num_pages * channels.count() * sizeof(T);
  }

 private:
  // logits[h][page] = scale[h] * sum over rows of weight[h][row] * bounds[row][page], for H heads from `first` on and
  // C chunks of pages. What is to be read kBlocksAhead further on is fetched, up to the block `fetch_end`.
  template <int H, int C>
  static void score_pages(const View<T>& view, HeadTask& task, const QueryChannels<T>& channels, int first,
                          int64_t page, int64_t fetch_end) {
    const Pages& pages = view.layer.pages;
    const int num_rows = channels.count(), stride = channels.stride();
    const int* rows = channels.rows.data();
    const Operand<T>* weights = channels.weights.data() + first * stride;
    const T* bounds[C];
    for (int k = 0; k < C; ++k) bounds[k] = page_bounds<T>(pages, task.index, page + k * kPair);
    const int64_t ahead = static_cast<int64_t>(kBlocksAhead) * pages.num_rows * kPagesPerBlock;
    const bool fetches = page / kPagesPerBlock + kBlocksAhead < fetch_end;
    Pair sums[C][H];
#pragma GCC unroll 2
    for (int k = 0; k < C; ++k)
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) sums[k][h] = {Vec{}, Vec{}};
    auto add = [&](const RowPair<T>& bound, int r, int k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) bound.add_weighted(weights + h * stride + r, sums[k][h]);
    };
    int r = 0;
    for (; r + 1 < num_rows; r += 2) {
      const int a = rows[r], b = rows[r + 1];
#pragma GCC unroll 2
      for (int k = 0; k < C; ++k) {
        if (fetches) prefetch(bounds[k] + ahead + a), prefetch(bounds[k] + ahead + b);
        add({bounds[k] + a, bounds[k] + b}, r, k);
      }
    }
    if (r < num_rows)
      for (int k = 0; k < C; ++k) {
        if (fetches) prefetch(bounds[k] + ahead + rows[r]);
        add(RowPair<T>(bounds[k] + rows[r]), r, k);
      }
    for (int k = 0; k < C; ++k)
      for (int h = 0; h < H; ++h) {
        Pair ordered = RowPair<T>::sums_in_order(sums[k][h]);
        float* out = task.logits + (first + h) * view.unit_stride + page + k * kPair;
        store(out, ordered.a * channels.scales[first + h]);
        store(out + kWidth, ordered.b * channels.scales[first + h]);
      }
  }
};

// One bound of each page, along few channels. See hybrid_logits in ops/pages.py.
template <class T>
struct PageScoring : BlockScoring<T> {
  static void prepare(const View<T>& view, const HeadTask& task, QueryChannels<T>& channels) {
    const Layer& layer = view.layer;
    const float* spread = layer.pages.spread ? layer.pages.spread + task.index * layer.head_dim : nullptr;
    const float* sums = channels.choose_largest(layer, task.row, view.query_of(task), spread);
    const bool has_minima = layer.pages.num_rows > layer.head_dim;  // the maxima follow them
    for (int& row : channels.rows) row = kPagesPerBlock * (row + (has_minima && sums[row] > 0 ? layer.head_dim : 0));
  }
};

// Both bounds of each page, along all channels (Quest, section "Dynamically Estimating Token Criticality"). See
// bound_logits in ops/pages.py.
template <class T>
struct BoundScoring : BlockScoring<T> {
  static void prepare(const View<T>& view, const HeadTask& task, QueryChannels<T>& channels) {
    const int head_dim = view.layer.head_dim, num_rows = view.layer.pages.num_rows;
    const T* query = view.query_of(task);
    channels.rows.resize(num_rows);
    channels.weights.assign(view.group * channels.stride(), Operand<T>{});
    channels.scales.assign(view.group, view.layer.scale);
    for (int r = 0; r < num_rows; ++r) {
      channels.rows[r] = r * kPagesPerBlock;
      for (int g = 0; g < view.group; ++g) {
        T stored = query[g * head_dim + r % head_dim];
        float q = to_float(stored);  // minima are read if it is negative, maxima if it is positive
        bool is_read = num_rows == head_dim || (r < head_dim ? q < 0 : q > 0);
        if (is_read) channels.weights[g * channels.stride() + r] = to_operand(stored);
      }
    }
  }
};

}  // namespace
}  // namespace rocketkv
