// The choice of the tokens that a task attends to, by the logits of its units.
#pragma once

#include "cut.h"
#include "softcap.h"
#include "view.h"

namespace rocketkv {
namespace {  // see view.h

constexpr int kFetchesAPass = 12;  // addresses fetched in each pass over a task's scores

// scores[unit] = mean over heads of the softmax over tokens, each of which has its unit's capped logit, and over the
// head's sink. A unit whose logit is NaN has the best score, NaN, and the others keep their order: so that unit is
// chosen, and shows in the output.
template <class T>
inline void average_softmax(const View<T>& view, const HeadTask& task, float* scores, Prefetcher<T>& prefetcher) {
  int64_t num_units = task.num_units, end = (num_units + kWidth - 1) / kWidth * kWidth;
  float in_last = static_cast<float>(task.length - (num_units - 1) * task.page_size);
  const float softcap = view.layer.terms.softcap, *sinks = view.sinks_of(task);
  for (int g = 0; g < view.group; ++g) {
    float* logits = task.logits + g * view.unit_stride;
    prefetcher.fetch(kFetchesAPass);
    if (softcap > 0) cap(logits, num_units, 1.0f / softcap, softcap);
    for (int64_t i = num_units; i < end; ++i) logits[i] = -kInfinity;
    Vec best = broadcast(sinks ? sinks[g] : -kInfinity), sum = {};
    for (int64_t i = 0; i < end; i += kWidth) best = max(load<Vec>(logits + i), best);  // no NaN
    Vec top = broadcast(max_lane(best));
    for (int64_t i = 0; i < end; i += kWidth) {
      Vec e = exp_of_negative(load<Vec>(logits + i) - top);
      store(logits + i, e);
      sum += e;
    }
    float size = static_cast<float>(task.page_size);
    float total = sum_lane(sum) * size - (size - in_last) * logits[num_units - 1];
    if (sinks) total += std::exp(sinks[g] - top[0]);
    if (total != total) total = 1.0f;
    Vec share = broadcast(1.0f / (total * static_cast<float>(view.group)));
    for (int64_t i = 0; i < end; i += kWidth) {
      Vec score = load<Vec>(logits + i) * share;
      if (g > 0) score += load<Vec>(scores + i);
      store(scores + i, abs(score));
    }
  }
}

// Write a task's chosen ranks, and let the prefetcher go on meanwhile. See score_tokens and choose_tokens in
// ops/scores.py.
template <class T>
inline void choose(const View<T>& view, HeadTask& task, Prefetcher<T>& prefetcher) {
  int64_t size = task.page_size;
  float* scores = task.logits;
  average_softmax(view, task, scores, prefetcher);
  int64_t sinks = std::min(view.layer.sinks[task.row], task.length);
  int64_t open_end =
      task.length - std::min(view.layer.recents[task.row], task.length - sinks);  // the pinned last tokens follow
  int64_t wanted = task.num_chosen - sinks - (task.length - open_end);
  int64_t begin = sinks / size, end = wanted > 0 ? (open_end + size - 1) / size : begin;  // units with open tokens
  auto num_open = [&](int64_t unit) { return std::min((unit + 1) * size, open_end) - std::max(unit * size, sinks); };
  auto num_above = [&](uint32_t bound) {  // open tokens; the pinned ends cut into the first and the last unit
    int64_t tokens = count_above(scores + begin, end - begin, bound) * size;
    if (order_bits(scores[begin]) > bound) tokens -= sinks - begin * size;
    if (order_bits(scores[end - 1]) > bound) tokens -= end * size - open_end;
    return tokens;
  };
  int32_t* out = task.chosen;
  for (int64_t rank = 0; rank < sinks; ++rank) *out++ = static_cast<int32_t>(rank);
  if (wanted > 0) {
    uint32_t cut = find_cut(wanted, [&](uint32_t bound) {
      prefetcher.fetch(kFetchesAPass);
      return num_above(bound);
    });
    int64_t at_cut = wanted - num_above(cut);  // so many tokens of the units equal to the cut are taken
    if (size == 1) {
      out = write_indices(cut, at_cut, scores, begin, end, out);
    } else {
      for_each_from(cut, scores, begin, end, [&](int64_t unit) {
        int64_t count = num_open(unit), first = std::max(unit * size, sinks);
        if (order_bits(scores[unit]) == cut) {
          count = std::min(count, at_cut);
          at_cut -= count;
        }
        for (int64_t i = 0; i < count; ++i) *out++ = static_cast<int32_t>(first + i);
      });
    }
  }
  for (int64_t rank = open_end; rank < task.length; ++rank) *out++ = static_cast<int32_t>(rank);
}

}  // namespace
}  // namespace rocketkv
