// The channels of one task's queries by which its tokens are scored.
#pragma once

#include <cmath>
#include <vector>

#include "cut.h"
#include "kernels.h"
#include "pairs.h"

namespace rocketkv {

// The rows of the index that a scoring reads, and their weights in the logits of the query heads.
template <class T>
struct QueryChannels {
  std::vector<int> rows;            // [count] the rows of the index that are read, as its scoring numbers them
  std::vector<Operand<T>> weights;  // [G][stride] the query at each row; zero at the one that makes their number even
  std::vector<float> scales;        // [G] what the sum over the rows is multiplied with

  int count() const { return static_cast<int>(rows.size()); }
  int stride() const { return round_up(count(), 2); }

  // Choose the num_channels[row] channels with the largest |q|, added over the query heads and times the `spread` [D]
  // of the keys, if there is one (RocketKV, section "Hybrid Sparse Attention", step 1). query: [G][D]. The rows become
  // these channels in ascending order, and the scales the layer's scale with SparQ's temperature. See largest_channels
  // in ops/channels.py.
  //
  // Returns the sums of q over the query heads, [D], which last until the next call.
  const float* choose_largest(const Layer& layer, int64_t row, const T* query, const float* spread) {
    const int head_dim = layer.head_dim, group = layer.num_heads / layer.num_kv_heads;
    const int padded = round_up(head_dim, kPair);
    const int64_t wanted = layer.num_channels[row];
    floats_.assign((group + 3) * padded, 0.0f);  // with whole pairs of channels, zeros beyond head_dim
    float *sizes = floats_.data(), *sums = sizes + padded, *factors = sums + padded, *queries = factors + padded;
    if (spread) {
      std::copy_n(spread, head_dim, factors);
    } else {
      std::fill_n(factors, head_dim, 1.0f);
    }
    scales.resize(group);  // at first, the sizes of all of a query head's channels together
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
    for (int c = 0; c < padded; c += kWidth)  // zero times infinity is NaN, with a sign
      store(sizes + c, rocketkv::abs(load<Vec>(sizes + c) * load<Vec>(factors + c)));
    auto num_above = [&](uint32_t bound) { return count_above(sizes, head_dim, bound); };
    const uint32_t cut = find_cut(wanted, num_above);
    rows.resize(wanted + kWidth);  // write_indices may write so many
    write_indices(cut, wanted - num_above(cut), sizes, 0, head_dim, rows.data());
    rows.resize(wanted);
    weights.resize(group * stride());
    for (int g = 0; g < group; ++g) {
      Operand<T>* weight = weights.data() + g * stride();
      float chosen = 0.0f;
      for (int i = 0; i < count(); ++i) {
        chosen += std::fabs(queries[g * padded + rows[i]]) * factors[rows[i]];
        weight[i] = to_operand(query[g * head_dim + rows[i]]);
      }
      if (count() < stride()) weight[count()] = Operand<T>{};
      const float share = chosen / scales[g];  // all sizes may be zero, or one of them NaN
      scales[g] = layer.scale / std::sqrt(share > 0 ? share : 1.0f);
    }
    return sums;
  }

 private:
  std::vector<float> floats_;
};

}  // namespace rocketkv
