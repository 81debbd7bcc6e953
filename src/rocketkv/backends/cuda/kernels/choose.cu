// The second launch of a decode step: let the spread of a head take in the new token; then turn the logits into one
// score per unit, and choose the tokens to attend to. See score_tokens and choose_tokens in ops/scores.py.
//
// Grid: heads. The kernel writes
//   scores  [heads][num_units]: as `ordered`; in the block's own memory if `scores` is null
//   chosen  [heads][most_chosen]: ranks, ascending
#include "layer.cuh"
#include "lowbit.cuh"
#include "pages.cuh"
#include "reduce.cuh"

enum Scoring { DENSE, EXACT, PAGES, BOUNDS, LOWBIT };

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
constexpr int DIGIT = 11;  // bits of the cut that one histogram finds
constexpr int BINS = 1 << DIGIT;
constexpr bool IS_PAGED = SCORING == PAGES || SCORING == BOUNDS;
constexpr int PART = SCORING == LOWBIT ? GROUP : WARP;  // as in append_and_score.cu

struct Cut {
  int bin;     // the bin in which the last token wanted lies
  int before;  // tokens in the bins above
  int inside;  // tokens in the bin
};

struct Shared {
  float best[G], shares[G];  // the largest logit of each query head, and the factor on the exponentials
  int bins[BINS];            // open tokens by their score
  int sure[WARPS], tied[WARPS];
  Cut cut;
};

// The tokens of a head that are chosen by their scores: those with ranks from `first` to before `end`.
struct Open {
  int first, end, page_size;
  __device__ __forceinline__ int begin_of(int unit) const { return max(unit * page_size, first); }
  __device__ __forceinline__ int end_of(int unit) const { return min((unit + 1) * page_size, end); }
  __device__ __forceinline__ int count(int unit) const { return max(0, end_of(unit) - begin_of(unit)); }
};

// Find the softmax of each query head from those of the parts.
__device__ __forceinline__ void merge_partials(const Layer& layer, const Head& head, int parts, Shared& shared) {
  const int lane = threadIdx.x % WARP;
  const float* partials = layer.partials + head.index * layer.num_parts * (2 * G);
  for (int g = threadIdx.x / WARP; g < G; g += WARPS) {
    float best = -MOST, total = 0.0f;
    for (int part = lane; part < parts; part += WARP) best = fmaxf(best, partials[part * (2 * G) + g]);
    const float sink = head.sink_of(layer, g);
    best = fmaxf(most_of_lanes(best), sink);
    for (int part = lane; part < parts; part += WARP)
      total += partials[part * (2 * G) + G + g] * __expf(partials[part * (2 * G) + g] - best);
    total = sum_lanes(total) + __expf(sink - best);
    if (total != total) total = 1.0f;  // a token whose logit is no number gets all, and the others keep their order
    if (lane == 0) shared.best[g] = best, shared.shares[g] = 1.0f / (total * G);
  }
}

// Count the open tokens whose score is in the bin of `cut` above `upper` bits, by the bits from `shift` on.
__device__ __forceinline__ void count_bins(const unsigned* scores, int units, const Open& open, unsigned cut, int upper,
                                           int shift, Shared& shared) {
  for (int unit = threadIdx.x; unit < units; unit += THREADS) {
    const unsigned score = scores[unit];
    const int count = open.count(unit);
    if (count && score >> upper == cut >> upper)
      atomicAdd(&shared.bins[score >> shift & ((1 << (upper - shift)) - 1)], count);
  }
}

// Add up the numbers of all threads before this one, and of this one.
__device__ __forceinline__ int sum_to_thread(int x, int (&totals)[WARPS]) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  x = sum_to_lane(x, lane);
  if (lane == WARP - 1) totals[warp] = x;
  __syncthreads();
  const int earlier = __shfl_sync(ALL, sum_to_lane(totals[lane], lane), max(warp - 1, 0));
  return x + (warp > 0 ? earlier : 0);
}

// Find the bin, from the highest on, in which the token lies that is the last of `wanted`.
__device__ __forceinline__ Cut find_bin(int wanted, Shared& shared) {
  const int bin = BINS - 1 - 2 * static_cast<int>(threadIdx.x);  // a thread has two bins
  const int high = shared.bins[bin], low = shared.bins[bin - 1];
  const int to_here = sum_to_thread(high + low, shared.sure), before = to_here - high - low;
  if (before < wanted && to_here >= wanted)
    shared.cut = before + high >= wanted ? Cut{bin, before, high} : Cut{bin - 1, before + high, low};
  __syncthreads();
  return shared.cut;
}

// Write the ranks of the pinned tokens, of the open ones whose score is above `bound` without its last `shift` bits,
// and of the first `wanted` with that score. Each warp takes units in a row.
__device__ __forceinline__ void write_chosen(const unsigned* scores, int length, int units, const Open& open,
                                             unsigned bound, int shift, int wanted, int* chosen, Shared& shared) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int share = (units + THREADS - 1) / THREADS * WARP, begin = min(warp * share, units);
  const int end = min(begin + share, units);
  auto count = [&](int unit, int& sure, int& tied) {  // of a unit's tokens
    sure = tied = 0;
    if (unit >= end) return;
    const int tokens = min((unit + 1) * open.page_size, length) - unit * open.page_size, num_open = open.count(unit);
    const unsigned score = scores[unit] >> shift;
    sure = tokens - num_open + (score > bound ? num_open : 0);
    tied = score == bound ? num_open : 0;
  };
  int num_sure = 0, num_tied = 0;
  for (int unit = begin + lane; unit < end; unit += WARP) {
    int sure, tied;
    count(unit, sure, tied);
    num_sure += sure, num_tied += tied;
  }
  num_sure = sum_to_lane(num_sure, lane), num_tied = sum_to_lane(num_tied, lane);
  if (lane == WARP - 1) shared.sure[warp] = num_sure, shared.tied[warp] = num_tied;
  __syncthreads();
  num_sure = num_tied = 0;
  for (int other = 0; other < warp; ++other) num_sure += shared.sure[other], num_tied += shared.tied[other];
  for (int start = begin; start < end; start += WARP) {
    const int unit = start + lane;
    int sure, tied;
    count(unit, sure, tied);
    const int sure_here = sum_to_lane(sure, lane), tied_here = sum_to_lane(tied, lane);
    const int sure_before = num_sure + sure_here - sure, tied_before = num_tied + tied_here - tied;
    int* out = chosen + sure_before + min(tied_before, wanted);
    if (sure + tied > 0) {
      const int first = unit * open.page_size, last = min(first + open.page_size, length);
      const int first_open = open.begin_of(unit), num_open = open.count(unit);
      const int taken = tied ? max(0, min(tied, wanted - tied_before)) : sure - (last - first - num_open);
      for (int rank = first; rank < min(last, open.first); ++rank) *out++ = rank;
      for (int rank = first_open; rank < first_open + taken; ++rank) *out++ = rank;
      for (int rank = max(first, open.end); rank < last; ++rank) *out++ = rank;
    }
    num_sure += __shfl_sync(ALL, sure_here, WARP - 1), num_tied += __shfl_sync(ALL, tied_here, WARP - 1);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) choose(const Layer __grid_constant__ layer) {
  __shared__ Shared shared;
  let_next_start();
  for (int bin = threadIdx.x; bin < BINS; bin += THREADS) shared.bins[bin] = 0;
  wait_for_previous();
  const Head head(layer, blockIdx.x, false);
  const int page_size = IS_PAGED ? static_cast<int>(layer.page_size[head.row]) : 1;
  // No block still chooses channels by the earlier spread.
  if (SCORING == LOWBIT) extend_lowbit_spread(layer, head);
  if (SCORING == PAGES && layer.spread) extend_page_spread(layer, head, page_size);
  if (!head.selects) return;
  const int units = (head.length + page_size - 1) / page_size;
  const int first = min(static_cast<int>(layer.sinks[head.row]), head.length);
  const int end = head.length - min(static_cast<int>(layer.recents[head.row]), head.length - first);
  const Open open{first, end, page_size};
  unsigned* scores =
      layer.scores ? layer.scores + head.index * layer.num_units : reinterpret_cast<unsigned*>(dynamic_shared);

  merge_partials(layer, head, (units + PART - 1) / PART, shared);
  __syncthreads();
  const float* logits = layer.logits + head.index * G * layer.num_units;
  int shift = 31 - DIGIT;
#pragma unroll 2
  for (int unit = threadIdx.x; unit < units; unit += THREADS) {
    float score = 0.0f;
    for (int g = 0; g < G; ++g) score += __expf(logits[g * layer.num_units + unit] - shared.best[g]) * shared.shares[g];
    scores[unit] = ordered(score);
    if (const int count = open.count(unit)) atomicAdd(&shared.bins[ordered(score) >> shift], count);
  }
  __syncthreads();

  int wanted = static_cast<int>(layer.top_k[head.row]) - first - (head.length - end);
  unsigned cut = 0x7fffffffu;  // nothing is above
  if (wanted > 0) {
    cut = 0;
    for (;;) {
      const Cut found = find_bin(wanted, shared);
      cut |= static_cast<unsigned>(found.bin) << shift;
      wanted -= found.before;
      if (found.inside == wanted || shift == 0) break;
      const int upper = shift;
      shift = max(shift - DIGIT, 0);
      for (int bin = threadIdx.x; bin < BINS; bin += THREADS) shared.bins[bin] = 0;
      __syncthreads();
      count_bins(scores, units, open, cut, upper, shift, shared);
      __syncthreads();
    }
  } else {
    shift = 0;
  }
  __syncthreads();
  write_chosen(scores, head.length, units, open, cut >> shift, shift, wanted,
               layer.chosen + head.index * layer.most_chosen, shared);
}
