// This file builds the low-bit index from the kept keys.
#include "lowbit.h"

#include <atomic>

#include "threads.h"

namespace rocketkv {
namespace {

constexpr int kCodesPerWord = 4;  // bytes of two codes each
constexpr int kWords = kHalfGroup / kCodesPerWord;

template <class T>
struct Build {
  const Keys& keys;
  const LowBitKeys& index;
  std::atomic<int64_t> next_task{0}, next_head{0};

  int64_t num_heads() const { return static_cast<int64_t>(keys.batch) * keys.num_kv_heads; }

  void work() {
    const int64_t num_groups = index.num_blocks * kGroupsPerBlock;
    for (int64_t task; (task = next_task.fetch_add(1)) < num_heads() * num_groups;)
      take_in_group(task / num_groups, task % num_groups);
  }

  // Groups are added in order, so that the sums equal those of an index that has grown.
  void sum_spreads() {
    for (int64_t head; (head = next_head.fetch_add(1)) < num_heads();) {
      const int64_t length = keys.lengths[head];
      for (int64_t closed = std::min<int64_t>(length, kGroup); closed <= length; closed += kGroup)
        extend_spread<T>(index, keys.head_dim, head, closed);
    }
  }

  // Quantize a group of a head's keys, or copy the group if it is open.
  void take_in_group(int64_t head, int64_t group) {
    const int64_t left = keys.lengths[head] - group * kGroup;
    const T* first = static_cast<const T*>(keys.keys) + head / keys.num_kv_heads * keys.batch_stride +
                     head % keys.num_kv_heads * keys.head_stride + group * kGroup * keys.head_dim;
    if (left >= kGroup) {
      for (int c = 0; c < keys.head_dim; c += kPair)
        quantize(first + c, std::min(kPair, keys.head_dim - c), c, head, group);
    } else {
      T* open = open_keys<T>(index, keys.head_dim, head);
      for (int64_t i = 0; i < left; ++i)
        for (int c = 0; c < keys.head_dim; ++c) open[c * kGroup + i] = first[i * keys.head_dim + c];
    }
  }

  // Quantize `count` channels, from `channel` on, of a whole group. See quantize_groups in ops/lowbit.py.
  void quantize(const T* first, int count, int channel, int64_t head, int64_t group) const {
    auto numbers = [&](int i) {
      const T* key = first + i * static_cast<int64_t>(keys.head_dim);
      return in_order<T>(count == kPair ? load_pair(key) : load_pair(Part<T>(key, count).numbers));
    };
    auto lower = [](Vec x, Vec best) { return (x < best) | (x != x) ? x : best; };  // a NaN stays
    auto higher = [](Vec x, Vec best) { return (x > best) | (x != x) ? x : best; };
    Pair low = numbers(0), high = low;
    for (int i = 1; i < kGroup; ++i) {
      const Pair x = numbers(i);
      low = {lower(x.a, low.a), lower(x.b, low.b)};
      high = {higher(x.a, high.a), higher(x.b, high.b)};
    }
    float least[kPair], step[kPair], most[kPair];
    store(least, low), store(most, high);
    T* range = block_ranges<T>(index, keys.head_dim, head, group / kGroupsPerBlock) +
               (channel * kGroupsPerBlock + group % kGroupsPerBlock) * 2;
    for (int c = 0; c < kPair; ++c) {
      const T rounded = from_float<T>((most[c] - least[c]) / kLevels);
      step[c] = to_float(rounded);
      if (c >= count) continue;
      range[c * kGroupsPerBlock * 2] = from_float<T>(least[c]);
      range[c * kGroupsPerBlock * 2 + 1] = rounded;
    }
    const Pair steps = load_pair(step);
    auto code = [](Vec x, Vec least, Vec step) {  // 0 / 0 is NaN where all numbers are alike
      const Vec rounded =
          min(max((x - least) / step, Vec{}), broadcast(kLevels)) + broadcast(12582912.0f);  // 1.5 * 2^23
      return load<VecBits>(&rounded) & 15u;
    };
    VecBits words[2][kWords] = {};  // a lane is a channel
    for (int i = 0; i < kHalfGroup; ++i) {
      const Pair x = numbers(i), y = numbers(i + kHalfGroup);
      const uint32_t shift = i % kCodesPerWord * 8;
      words[0][i / kCodesPerWord] |= (code(x.a, low.a, steps.a) | code(y.a, low.a, steps.a) << 4) << shift;
      words[1][i / kCodesPerWord] |= (code(x.b, low.b, steps.b) | code(y.b, low.b, steps.b) << 4) << shift;
    }
    uint8_t* codes = group_codes(index, keys.head_dim, head, group) + channel * kGroupsPerBlock * kHalfGroup;
    for (int c = 0; c < count; ++c)
      for (int w = 0; w < kWords; ++w)
        store(codes + c * kGroupsPerBlock * kHalfGroup + w * kCodesPerWord, words[c / kWidth][w][c % kWidth]);
  }
};

template <class T>
void build(const Keys& keys, const LowBitKeys& index, int num_threads) {
  Build<T> build{keys, index};
  run_on_threads(num_threads, [](void* self) { static_cast<Build<T>*>(self)->work(); }, &build);
  run_on_threads(num_threads, [](void* self) { static_cast<Build<T>*>(self)->sum_spreads(); }, &build);
}

}  // namespace

void build_lowbit(const Keys& keys, const LowBitKeys& index, int num_threads) {
  switch (keys.dtype) {
    case Dtype::kFloat32: return build<float>(keys, index, num_threads);
    case Dtype::kBfloat16: return build<Bfloat16>(keys, index, num_threads);
    default: return build<Float16>(keys, index, num_threads);
  }
}

}  // namespace rocketkv
