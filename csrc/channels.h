// Which rows of the index one head's step reads, what each adds to the logits of its query heads, and fetching them.
//
// A row is a channel of the keys, or of the minima or the maxima of pages.
#pragma once

#include <cmath>
#include <vector>

#include "cut.h"
#include "kernels.h"
#include "lowbit.h"
#include "pages.h"

namespace rocketkv {

constexpr int kBlocksAhead = 2;  // of pages, between a prefetch and its use

template <class T>
struct Channels {
  std::vector<int> places;         // of the rows in a block of pages; of low-bit keys, the channels
  std::vector<Factor<T>> weights;  // [G][rows, and one more if they are odd in number]
  std::vector<float> scales;       // [G] factors on the sums

  int count() const { return static_cast<int>(places.size()); }
  int stride() const { return round_up(count(), 2); }

  // RocketKV, section "Hybrid Sparse Attention", step 1, by |q| times the spread [D], if there is one; see hybrid_logits in
  // ops/pages.py, and lowbit_logits in ops/lowbit.py. query: [G][D].
  void choose_largest(const Layer& layer, int64_t row, const T* query, const float* spread) {
    const int head_dim = layer.head_dim, padded = round_up(head_dim, kPair), group = layer.num_heads / layer.num_kv_heads;
    const int64_t wanted = layer.num_channels[row];
    floats_.assign((group + 3) * padded, 0.0f);  // with whole pairs of channels, zeros beyond head_dim
    float *sizes = floats_.data(), *sums = sizes + padded, *factors = sums + padded, *queries = factors + padded;
    if (spread) {
      std::copy_n(spread, head_dim, factors);
    } else {
      std::fill_n(factors, head_dim, 1.0f);
    }
    scales.resize(group);  // first all of the query's channels together
    for (int g = 0; g < group; ++g) {
      Vec all = {};
      for (int c = 0; c < padded; c += kPair) {
        Part<T> part(query + g * head_dim + c, std::min(kPair, head_dim - c));
        Pair pair = in_order<T>(load_pair(part.numbers));
        for (int half = 0; half < 2; ++half) {
          Vec q = half == 0 ? pair.a : pair.b, size = rocketkv::abs(q);
          int at = c + half * kWidth;
          all += size * load<Vec>(factors + at);
          store(queries + g * padded + at, q);
          store(sizes + at, load<Vec>(sizes + at) + size);
          store(sums + at, load<Vec>(sums + at) + q);
        }
      }
      scales[g] = sum_lane(all);
    }
    for (int c = 0; c < padded; c += kWidth)  // zero times infinity is no number, with a sign
      store(sizes + c, rocketkv::abs(load<Vec>(sizes + c) * load<Vec>(factors + c)));
    auto num_above = [&](uint32_t bound) { return count_above(sizes, head_dim, bound); };
    const uint32_t cut = find_cut(wanted, num_above);
    places.resize(wanted + kWidth);  // what write_places may write
    write_places(cut, wanted - num_above(cut), sizes, 0, head_dim, places.data());
    places.resize(wanted);
    weights.resize(group * stride());
    for (int g = 0; g < group; ++g) {
      Factor<T>* weight = weights.data() + g * stride();
      float chosen = 0.0f;
      for (int i = 0; i < count(); ++i) {
        chosen += std::fabs(queries[g * padded + places[i]]) * factors[places[i]];
        weight[i] = to_factor(query[g * head_dim + places[i]]);
      }
      if (count() < stride()) weight[count()] = Factor<T>{};
      const float share = chosen / scales[g];  // SparQ's temperature; all sizes may be zero, or one no number
      scales[g] = layer.scale / std::sqrt(share > 0 ? share : 1.0f);
    }
    if (layer.scoring == Scoring::kLowBit) return;  // the temperature is not for these
    const bool has_minima = layer.pages.num_rows > head_dim;  // the maxima follow them
    for (int& place : places) place = kBlockPages * (place + (has_minima && sums[place] > 0 ? head_dim : 0));
  }

  // Quest, section "Dynamically Estimating Token Criticality"; see bound_logits in ops/pages.py. query: [G][D].
  void take_all(const Layer& layer, const T* query) {
    const int head_dim = layer.head_dim, num_rows = layer.pages.num_rows, group = layer.num_heads / layer.num_kv_heads;
    places.resize(num_rows);
    weights.assign(group * stride(), Factor<T>{});
    scales.assign(group, layer.scale);
    for (int r = 0; r < num_rows; ++r) {
      places[r] = r * kBlockPages;
      for (int g = 0; g < group; ++g) {
        T stored = query[g * head_dim + r % head_dim];
        float q = to_float(stored);
        bool is_read = num_rows == head_dim || (r < head_dim ? q < 0 : q > 0);  // minima if negative, maxima if positive
        if (is_read) weights[g * stride() + r] = to_factor(stored);
      }
    }
  }

 private:
  std::vector<float> floats_;
};

// What a thread's next head reads first, fetched little by little while the present one computes: the memory is idle then.
template <class T>
class Ahead {
 public:
  // The block of pages that the new token, in block `last`, goes into, and the first blocks that are scored.
  void begin_pages(const Layer& layer, int64_t head, const Channels<T>& channels, int64_t last) {
    rows_.clear(), next_ = 0;
    for (int64_t block = 0; block < std::min<int64_t>(kBlocksAhead, last + 1); ++block)
      for (int at : channels.places) rows_.push_back(page_bounds<T>(layer.pages, head, block * kBlockPages) + at);
    const T* open = page_bounds<T>(layer.pages, head, last * kBlockPages);
    for (int r = 0; r < layer.pages.num_rows; ++r) rows_.push_back(open + r * kBlockPages);
  }

  // The ranges and the first codes of the first block, and where the new token's key, at `place`, goes.
  void begin_lowbit(const Layer& layer, int64_t head, const Channels<T>& channels, int64_t place) {
    rows_.clear(), next_ = 0;
    const int dim = layer.head_dim;
    if (place >= kGroup) {
      const T* ranges = block_ranges<T>(layer.lowbit, dim, head, 0);
      const uint8_t* codes = group_codes(layer.lowbit, dim, head, 0);
      for (int at : channels.places) rows_.push_back(ranges + at * kBlockGroups * 2);
      for (int at : channels.places) rows_.push_back(codes + at * kBlockGroups * kHalfGroup);
    }
    const T* open = open_keys<T>(layer.lowbit, dim, head) + place % kGroup;
    for (int c = 0; c < dim; ++c) rows_.push_back(open + c * kGroup);
  }

  // At most `num_rows` more.
  void fetch(int num_rows) {
    const size_t end = std::min(rows_.size(), next_ + num_rows);
    for (; next_ < end; ++next_) prefetch(rows_[next_], kBlockPages * sizeof(T));
  }
  void fetch_all() { fetch(static_cast<int>(rows_.size())); }

 private:
  std::vector<const void*> rows_;  // kBlockPages numbers of each, a cache line in 16 bits
  size_t next_ = 0;
};

}  // namespace rocketkv
