// The kernels' work in plain loops over doubles, and the random numbers that both get.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <vector>

#include "../../csrc/dtypes.h"
#include "../../csrc/kernels.h"

namespace plain {

using namespace rocketkv;

using Row = std::vector<double>;
using Rows = std::vector<Row>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Numbers between -1 and 1 that T holds exactly, the same on every machine.
struct Random {
  uint64_t state = 0x9e3779b97f4a7c15u;
  double next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<double>(state >> 11) / static_cast<double>(uint64_t{1} << 52) - 1.0;
  }
  template <class T>
  std::vector<T> numbers(size_t count) {
    std::vector<T> out(count);
    for (T& x : out) x = from_float<T>(static_cast<float>(next()));
    return out;
  }
};

template <class T>
Row to_row(const T* numbers, int count) {
  Row row(count);
  for (int i = 0; i < count; ++i) row[i] = to_float(numbers[i]);
  return row;
}

template <class T>
double rounded(double x) {
  return to_float(from_float<T>(static_cast<float>(x)));
}

inline double dot(const Row& a, const Row& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

inline Row softmax(Row logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double& x : logits) sum += x = std::exp(x - largest);
  for (double& x : logits) x /= sum;
  return logits;
}

// The attention of one query to the tokens of these ranks.
inline Row attend(const Row& query, const Rows& keys, const Rows& values, const std::vector<int>& ranks, double scale) {
  Row logits, output(query.size());
  for (int rank : ranks) logits.push_back(scale * dot(query, keys[rank]));
  const Row weights = softmax(logits);
  for (size_t i = 0; i < ranks.size(); ++i)
    for (size_t c = 0; c < output.size(); ++c) output[c] += weights[i] * values[ranks[i]][c];
  return output;
}

// The largest less the smallest of a channel of the keys begin .. end.
inline double range(const Rows& keys, int begin, int end, int channel) {
  double low = kInfinity, high = -kInfinity;
  for (int i = begin; i < end; ++i) low = std::min(low, keys[i][channel]), high = std::max(high, keys[i][channel]);
  return high - low;
}

// How far the keys of each channel lie apart, as an index with runs of so many tokens sums it up. `step` makes of the
// range of a whole run what is added.
template <class Step>
Row spread(const Rows& keys, int num_tokens, int run, Step step) {
  const int dim = static_cast<int>(keys[0].size());
  Row out(dim);
  for (int c = 0; c < dim; ++c) {
    for (int begin = 0; begin + run <= num_tokens; begin += run) out[c] += step(range(keys, begin, begin + run, c));
    if (num_tokens < run) out[c] = range(keys, 0, num_tokens, c);
  }
  return out;
}

// The channels in which the query heads are largest together, times the spread.
inline std::vector<int> largest_channels(const Rows& queries, const Row& spread, int num_channels) {
  Row sizes(spread.size());
  for (const Row& query : queries)
    for (size_t c = 0; c < sizes.size(); ++c) sizes[c] += std::fabs(query[c]) * spread[c];
  std::vector<int> channels(sizes.size());
  std::iota(channels.begin(), channels.end(), 0);
  std::stable_sort(channels.begin(), channels.end(), [&](int a, int b) { return sizes[a] > sizes[b]; });
  channels.resize(num_channels);
  return channels;
}

// What a step scores by, for one KV head: the logit of each token, [query heads][tokens].
struct Scorer {
  const Rows &queries, &keys;
  double scale;
  int num_channels, page_size;

  Rows exact() const {
    Rows logits;
    for (const Row& query : queries) {
      logits.emplace_back();
      for (const Row& key : keys) logits.back().push_back(scale * dot(query, key));
    }
    return logits;
  }

  // Quest: along each channel the bound of the token's page that makes the product largest.
  Rows bounds() const {
    return of_pages([](const Row& query, const Row& low, const Row& high) {
      double sum = 0;
      for (size_t c = 0; c < query.size(); ++c) sum += std::max(query[c] * low[c], query[c] * high[c]);
      return sum;
    });
  }

  // RocketKV: along the largest channels one bound, the same for all query heads, with SparQ's temperature.
  Rows pages() const {
    const Row spread = plain::spread(keys, static_cast<int>(keys.size()) - 1, kPagesPerBlock * page_size,
                                     [](double range) { return range; });
    const std::vector<int> channels = largest_channels(queries, spread, num_channels);
    return of_pages([&](const Row& query, const Row& low, const Row& high) {
      double sum = 0, chosen = 0, all = 0;
      for (size_t c = 0; c < query.size(); ++c) all += std::fabs(query[c]) * spread[c];
      for (int c : channels) {
        double of_heads = 0;
        for (const Row& each : queries) of_heads += each[c];
        sum += query[c] * (of_heads > 0 ? high[c] : low[c]);
        chosen += std::fabs(query[c]) * spread[c];
      }
      return sum / std::sqrt(chosen / all);
    });
  }

  // Keys in 4 bits, in whole groups; the keys of the last group are as they came.
  template <class T>
  Rows lowbit() const {
    const int num_tokens = static_cast<int>(keys.size()), whole = num_tokens / kGroup * kGroup;
    auto step_of = [](double range) { return rounded<T>(range / kLevels); };
    const Row spread = plain::spread(keys, num_tokens - 1, kGroup, step_of);
    Rows logits(queries.size(), Row(num_tokens));
    for (int c : largest_channels(queries, spread, num_channels)) {
      for (int begin = 0; begin < whole; begin += kGroup) {
        double low = kInfinity;
        for (int s = begin; s < begin + kGroup; ++s) low = std::min(low, keys[s][c]);
        const double step = step_of(range(keys, begin, begin + kGroup, c));
        for (size_t h = 0; h < queries.size(); ++h) {
          const double q = queries[h][c], weight = std::is_same_v<T, Bfloat16> ? rounded<T>(q * step) : q * step;
          for (int s = begin; s < begin + kGroup; ++s) {
            const float steps = static_cast<float>(keys[s][c] - low) / static_cast<float>(step);  // halves are likely
            const double code = std::clamp(std::nearbyint(steps), 0.0f, float{kLevels});
            logits[h][s] += scale * (q * low + weight * code);
          }
        }
      }
      for (int s = whole; s < num_tokens; ++s)
        for (size_t h = 0; h < queries.size(); ++h) logits[h][s] += scale * queries[h][c] * keys[s][c];
    }
    return logits;
  }

 private:
  template <class Logit>
  Rows of_pages(Logit logit) const {
    const int num_tokens = static_cast<int>(keys.size()), dim = static_cast<int>(keys[0].size());
    Rows logits(queries.size());
    for (int s = 0; s < num_tokens; ++s) {
      const int begin = s / page_size * page_size, end = std::min(begin + page_size, num_tokens);
      Row low(dim, kInfinity), high(dim, -kInfinity);
      for (int i = begin; i < end; ++i)
        for (int c = 0; c < dim; ++c) low[c] = std::min(low[c], keys[i][c]), high[c] = std::max(high[c], keys[i][c]);
      for (size_t h = 0; h < queries.size(); ++h) logits[h].push_back(scale * logit(queries[h], low, high));
    }
    return logits;
  }
};

// The score of each token: the softmax of each query head's logits, and the mean over the heads.
inline Row scores(const Rows& logits) {
  Row out(logits[0].size());
  for (const Row& each : logits) {
    const Row shares = softmax(each);
    for (size_t s = 0; s < out.size(); ++s) out[s] += shares[s] / static_cast<double>(logits.size());
  }
  return out;
}

}  // namespace plain
