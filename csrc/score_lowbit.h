// Scoring by the keys in 4 bits, along the query's largest channels.
#pragma once

#include "dot.h"
#include "lowbit.h"
#include "view.h"

namespace rocketkv {
namespace {  // see view.h

constexpr int kGroupsAhead = 4;  // groups of low-bit keys between a prefetch and its use

// The rows of QueryChannels are channels. See lowbit_logits in ops/lowbit.py.
template <class T>
struct LowBitScoring {
  static constexpr int kUnitsPerBlock = kGroup;

  static int64_t page_size(const Layer&, int64_t) { return 1; }
  static const float* spread(const Layer& layer) { return layer.lowbit.spread; }

  static void append(const Layer& layer, const HeadTask& task, const T* key) {
    if (layer.lowbit.codes) append_key(layer.lowbit, layer.head_dim, task.index, task.length - 1, key);
  }
  static void extend_spread(const Layer& layer, const HeadTask& task) {
    if (layer.lowbit.codes) rocketkv::extend_spread<T>(layer.lowbit, layer.head_dim, task.index, task.length);
  }

  static void prepare(const View<T>& view, const HeadTask& task, QueryChannels<T>& channels) {
    const float* spread = view.layer.lowbit.spread + task.index * view.layer.head_dim;
    channels.choose_largest(view.layer, task.row, view.query_of(task), spread);  // its scales are for pages only
  }

  // What is read first: the ranges and the first codes of the first block, and where the new token's key goes.
  static void fetch_first(const View<T>& view, const HeadTask& task, const QueryChannels<T>& channels,
                          Prefetcher<T>& prefetcher) {
    const int dim = view.layer.head_dim;
    const int64_t rank = task.length - 1;
    if (rank >= kGroup) {
      const T* ranges = block_ranges<T>(view.layer.lowbit, dim, task.index, 0);
      const uint8_t* codes = group_codes(view.layer.lowbit, dim, task.index, 0);
      for (int channel : channels.rows) prefetcher.add(ranges + channel * kGroupsPerBlock * 2);
      for (int channel : channels.rows) prefetcher.add(codes + channel * kGroupsPerBlock * kHalfGroup);
    }
    const T* open = open_keys<T>(view.layer.lowbit, dim, task.index) + rank % kGroup;
    for (int c = 0; c < dim; ++c) prefetcher.add(open + c * kGroup);
  }

  // Score the groups [begin, end), the last of which may be open.
  static int64_t score(const View<T>& view, HeadTask& task, const QueryChannels<T>& channels, int64_t begin,
                       int64_t end) {
    const int64_t whole = task.length / kGroup, num_open = end > whole ? task.length % kGroup : 0;
    const int64_t group_bytes = channels.count() * (kHalfGroup + 2 * sizeof(T));
    end = std::min(end, whole);
    const int64_t bytes_read =
        std::max<int64_t>(end - begin, 0) * group_bytes + num_open * channels.count() * sizeof(T);
    for (int h = 0; h < view.group; h += kMaxHeads)
      with_heads(view.group - h, [&](auto heads) {
        for (int64_t group = begin; group < end;) {
          int64_t stop = std::min(end, (group / kGroupsPerBlock + 1) * kGroupsPerBlock);
          score_whole_groups<heads>(view, task, channels, h, group, stop, h == 0 && stop < end);
          group = stop;
        }
        if (num_open > 0) score_open_group<heads>(view, task, channels, h, whole);
      });
    return bytes_read;
  }

 private:
  // Score whole groups of one block. A key is low + step * code, so that each channel adds q * low to all of a group's
  // logits, and the weights of its codes are q * step. If another block follows, what is read first of it is fetched.
  // Ranges of other groups than these may be undefined, or be written by the thread that appends: what comes of them is
  // not used.
  template <int H>
  static void score_whole_groups(const View<T>& view, HeadTask& task, const QueryChannels<T>& channels, int first,
                                 int64_t begin, int64_t end, bool fetches) {
    const int num_rows = channels.count(), stride = channels.stride(), dim = view.layer.head_dim;
    const int64_t block = begin / kGroupsPerBlock;
    const T* ranges = block_ranges<T>(view.layer.lowbit, dim, task.index, block);
    std::vector<float>& weights = Scratch<T>::mine().weights;  // [pairs of rows][H], as CodePair wants them
    weights.resize((num_rows + 1) / 2 * H * CodePair<T>::kWeights);
    float offsets[H][kGroupsPerBlock];
    for (int i = 0; i < kGroupsPerBlock; i += kWidth) {
      Vec sums[H] = {};
      for (int r = 0; r < num_rows; r += 2) {
        Vec pair[H][2] = {};
        for (int j = 0; j < std::min(2, num_rows - r); ++j) {
          Pair range = load_ranges(ranges + (channels.rows[r + j] * kGroupsPerBlock + i) * 2);
          for (int h = 0; h < H; ++h) {
            float q = to_float(channels.weights[(first + h) * stride + r + j]);
            pair[h][j] = round_weights<T>(range.b * q);
            sums[h] += range.a * q - pair[h][j] * CodePair<T>::kOffset;
          }
        }
        for (int h = 0; h < H; ++h)
          CodePair<T>::store_weights(&weights[(r / 2 * H + h) * CodePair<T>::kWeights + i], pair[h][0], pair[h][1]);
      }
      for (int h = 0; h < H; ++h) store(&offsets[h][i], sums[h]);
    }
    const T* next_ranges = ranges + dim * kGroupsPerBlock * 2;
    const uint8_t* next_codes = group_codes(view.layer.lowbit, dim, task.index, (block + 1) * kGroupsPerBlock);
    for (int64_t group = begin; group < end; ++group) {
      const uint8_t* codes = group_codes(view.layer.lowbit, dim, task.index, group);
      const int in_block = static_cast<int>(group % kGroupsPerBlock);
      // A cache line holds the codes of two groups; four groups on is another, of this block or of the next.
      const bool is_near = in_block + kGroupsAhead < kGroupsPerBlock;
      const uint8_t* ahead = is_near ? codes + kGroupsAhead * kHalfGroup
                                     : next_codes + (in_block + kGroupsAhead - kGroupsPerBlock) * kHalfGroup;
      const bool fetches_codes = in_block % 2 == 0 && (is_near || fetches);
      const bool fetches_ranges = in_block == kGroupsPerBlock / 2 && fetches;
      for (int at = 0; at < kHalfGroup; at += kWidth * kChunks) {
        Pair sums[kChunks][H];
#pragma GCC unroll 2
        for (int k = 0; k < kChunks; ++k)
#pragma GCC unroll 4
          for (int h = 0; h < H; ++h) sums[k][h] = {Vec{}, Vec{}};
        for (int r = 0; r < num_rows; r += 2) {
          const int one = channels.rows[r], other = channels.rows[std::min(r + 1, num_rows - 1)];
          constexpr int codes_stride = kGroupsPerBlock * kHalfGroup, ranges_stride = kGroupsPerBlock * 2;
          if (at == 0 && fetches_codes) prefetch(ahead + one * codes_stride), prefetch(ahead + other * codes_stride);
          if (at == 0 && fetches_ranges) {
            prefetch(next_ranges + one * ranges_stride);
            prefetch(next_ranges + other * ranges_stride);
          }
          const float* weight = &weights[r / 2 * H * CodePair<T>::kWeights + in_block];
#pragma GCC unroll 2
          for (int k = 0; k < kChunks; ++k) {
            const uint8_t* from = codes + at + k * kWidth;
            const CodePair<T> two(from + one * codes_stride, from + other * codes_stride);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) two.add_weighted(weight + h * CodePair<T>::kWeights, sums[k][h]);
          }
        }
        for (int k = 0; k < kChunks; ++k)
          for (int h = 0; h < H; ++h) {
            float* out = task.logits + (first + h) * view.unit_stride + group * kGroup + at + k * kWidth;
            store(out, (sums[k][h].a + offsets[h][in_block]) * view.layer.scale);
            store(out + kHalfGroup, (sums[k][h].b + offsets[h][in_block]) * view.layer.scale);
          }
      }
    }
  }

  // Score the tokens of the open group, whose keys are stored as they came.
  template <int H>
  static void score_open_group(const View<T>& view, HeadTask& task, const QueryChannels<T>& channels, int first,
                               int64_t group) {
    const T* keys = open_keys<T>(view.layer.lowbit, view.layer.head_dim, task.index);
    for (int at = 0; at < kGroup; at += kPair) {
      Pair sums[H] = {};
      int r = 0;
      for (; r + 1 < channels.count(); r += 2) {
        RowPair<T> chunks(keys + at + channels.rows[r] * kGroup, keys + at + channels.rows[r + 1] * kGroup);
        for (int h = 0; h < H; ++h)
          chunks.add_weighted(&channels.weights[(first + h) * channels.stride() + r], sums[h]);
      }
      if (r < channels.count()) {
        RowPair<T> chunk(keys + at + channels.rows[r] * kGroup);
        for (int h = 0; h < H; ++h) chunk.add_weighted(&channels.weights[(first + h) * channels.stride() + r], sums[h]);
      }
      for (int h = 0; h < H; ++h) {
        Pair ordered = RowPair<T>::sums_in_order(sums[h]);
        float* out = task.logits + (first + h) * view.unit_stride + group * kGroup + at;
        store(out, ordered.a * view.layer.scale);
        store(out + kWidth, ordered.b * view.layer.scale);
      }
    }
  }
};

}  // namespace
}  // namespace rocketkv
