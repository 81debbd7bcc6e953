// The last launch of a decode step: attend to the chosen tokens of a head, or to all, in pieces; the block that ends
// last merges the pieces, in order, and counts the new token.
//
// Grid: heads, pieces, chunks of HEADS query heads. The kernel hands over
//   pieces       [heads][num_pieces][G][D]: the sum of a piece's weighted values
//   states       [heads][num_pieces][2][G]: the largest logit of a piece, and its sum of weights
//   pieces_done  [heads]: the number of blocks that are done, zero between steps
#include "layer.cuh"
#include "rows.cuh"

constexpr int WARPS = 4;
constexpr int STEPS = 4;                      // rows that a lane loads before it uses the first
constexpr int TOKENS = STEPS * ROWS;          // tokens of a warp's tile
constexpr int BLOCK_TOKENS = WARPS * TOKENS;  // pieces begin at multiples of this number
constexpr int MOST_PIECES = 128;
constexpr int HEAD_CHUNKS = (G + HEADS - 1) / HEADS;
constexpr int CHANNELS = (D + WARP - 1) / WARP;  // channels that a lane merges
constexpr int64 TOKEN_BYTES = 2 * (INT8 ? D + NUM_STEPS : D * static_cast<int>(sizeof(T)));

// The state of a softmax over some tokens: their largest logit, the sum of their weights relative to it.
struct State {
  float best, total;
};

struct Shared {
  float sums[WARPS][HEADS][D];
  State states[WARPS][HEADS];
  float weights[WARPS][MOST_PIECES];
  bool is_last;
};

// What a warp has of some tokens, for HEADS query heads.
struct Attention {
  float best[HEADS], total[HEADS], sums[HEADS][NUMBERS];

  __device__ __forceinline__ Attention() {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      best[h] = -MOST, total[h] = 0.0f;
#pragma unroll
      for (int i = 0; i < NUMBERS; ++i) sums[h][i] = 0.0f;
    }
  }

  // Take in a tile of tokens, of which the first `count` are there.
  __device__ __forceinline__ void take(const Layer& layer, const Head& head, const int* chosen, int start, int count,
                                       const float (&queries)[HEADS][NUMBERS], int lane) {
    Row<Stored> keys[STEPS], values[STEPS];
    bool is_there[STEPS];
    int64 slots[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int at = i * ROWS + lane / ROW_LANES;
      is_there[i] = at < count;
      const int rank = !is_there[i] ? 0 : chosen ? chosen[start + at] : start + at;
      slots[i] = is_there[i] ? head.slot_of(layer, rank) : 0;
      if (is_there[i] && layer.report && blockIdx.z == 0 && lane % ROW_LANES == 0)
        layer.report[head.index * layer.position_capacity + start + at] = rank;
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) keys[i].load(layer.keys, layer.exponents, 0, slots[i], is_there[i], lane);
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
      values[i].load(layer.values, layer.exponents, NUM_STEPS, slots[i], is_there[i], lane);

    float logits[STEPS][HEADS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      float key[NUMBERS];
      keys[i].unpack(key);
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const float product = capped(dot(queries[h], key) * layer.scale, layer.softcap);
        logits[i][h] = is_there[i] ? product : -infinity();
      }
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float highest = best[h];
#pragma unroll
      for (int i = 0; i < STEPS; ++i) highest = fmaxf(highest, logits[i][h]);
      highest = most_of_lanes<WARP, ROW_LANES>(highest);
      const float shrunk = __expf(best[h] - highest);
      best[h] = highest;
      total[h] *= shrunk;
#pragma unroll
      for (int j = 0; j < NUMBERS; ++j) sums[h][j] *= shrunk;
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      float value[NUMBERS];
      values[i].unpack(value);
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const float weight = __expf(logits[i][h] - best[h]);
        total[h] += weight;
#pragma unroll
        for (int j = 0; j < NUMBERS; ++j) sums[h][j] += weight * value[j];
      }
    }
  }

  // Add up the rows that the lanes of the warp have taken in apart, and hand over to the block.
  __device__ __forceinline__ void hand_over(Shared& shared, int warp, int lane) {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      for (int step = ROW_LANES; step < WARP; step *= 2) {
        total[h] += __shfl_xor_sync(ALL, total[h], step);
#pragma unroll
        for (int j = 0; j < NUMBERS; ++j) sums[h][j] += __shfl_xor_sync(ALL, sums[h][j], step);
      }
      if (lane == 0) shared.states[warp][h] = {best[h], total[h]};
      for (int j = 0; j < NUMBERS; ++j)
        if (lane < ROW_LANES && channel_of(lane, j) < D) shared.sums[warp][h][channel_of(lane, j)] = sums[h][j];
    }
  }
};

// Merge what the warps of a block have into its piece.
__device__ __forceinline__ void store_piece(const Layer& layer, int64 piece, int first, const Shared& shared) {
  for (int i = threadIdx.x; i < HEADS * D; i += blockDim.x) {
    const int h = i / D, channel = i % D;
    if (first + h >= G) break;
    float best = -MOST, total = 0.0f, sum = 0.0f;
    for (int w = 0; w < WARPS; ++w) best = fmaxf(best, shared.states[w][h].best);
    for (int w = 0; w < WARPS; ++w) {
      const float weight = __expf(shared.states[w][h].best - best);
      total += weight * shared.states[w][h].total;
      sum += weight * shared.sums[w][h][channel];
    }
    layer.pieces[(piece * G + first + h) * D + channel] = sum;
    if (channel > 0) continue;
    layer.states[piece * (2 * G) + first + h] = best;
    layer.states[piece * (2 * G) + G + first + h] = total;
  }
}

// Merge the pieces of a head into its output; a warp takes one query head at a time.
__device__ __forceinline__ void merge_pieces(const Layer& layer, const Head& head, int num_pieces, Shared& shared) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64 first = head.index * layer.num_pieces;
  float* weights = shared.weights[warp];
  for (int g = warp; g < G; g += WARPS) {
    float best = -MOST, total = 0.0f;
    for (int p = lane; p < num_pieces; p += WARP) best = fmaxf(best, __ldcg(layer.states + (first + p) * (2 * G) + g));
    const float sink = head.sink_of(layer, g);
    best = fmaxf(most_of_lanes(best), sink);
    for (int p = lane; p < num_pieces; p += WARP) {
      const float* state = layer.states + (first + p) * (2 * G) + g;
      weights[p] = __expf(__ldcg(state) - best);
      total += weights[p] * __ldcg(state + G);
    }
    total = sum_lanes(total) + __expf(sink - best);
    float sums[CHANNELS];
    for (int c = 0; c < CHANNELS; ++c) sums[c] = 0.0f;
    __syncwarp();
#pragma unroll 4
    for (int p = 0; p < num_pieces; ++p)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        if (c * WARP + lane < D)
          sums[c] += weights[p] * __ldcg(layer.pieces + ((first + p) * G + g) * D + c * WARP + lane);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
      if (c * WARP + lane < D)
        layer.output[(head.index * G + g) * D + c * WARP + lane] = from_float<T>(sums[c] / total);
    __syncwarp();  // the next head's weights take the place of these
  }
}

extern "C" __global__ void __launch_bounds__(WARPS* WARP) attend(const Layer __grid_constant__ layer) {
  __shared__ Shared shared;
  wait_for_previous();
  const Head head(layer, blockIdx.x, layer.chosen == nullptr);
  const int count = head.selects ? static_cast<int>(layer.top_k[head.row]) : head.length;
  const int* chosen = head.selects ? layer.chosen + head.index * layer.most_chosen : nullptr;
  const int piece_size = round_up((count + layer.num_pieces - 1) / layer.num_pieces, BLOCK_TOKENS);
  const int used = (count + piece_size - 1) / piece_size, begin = blockIdx.y * piece_size;
  const int end = min(begin + piece_size, count), first = blockIdx.z * HEADS;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  if (begin < end) {
    float queries[HEADS][NUMBERS];
    load_queries(layer.query + head.index * (G * D), first, lane, queries);
    Attention attention;
    for (int start = begin + warp * TOKENS; start < end; start += BLOCK_TOKENS)
      attention.take(layer, head, chosen, start, min(TOKENS, end - start), queries, lane);
    attention.hand_over(shared, warp, lane);
    __syncthreads();
    store_piece(layer, head.index * layer.num_pieces + blockIdx.y, first, shared);
  }
  __threadfence();  // what this block has stored comes before its count
  __syncthreads();
  const int blocks = layer.num_pieces * HEAD_CHUNKS;
  if (threadIdx.x == 0) shared.is_last = atomicAdd(layer.pieces_done + head.index, 1) == blocks - 1;
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();
  merge_pieces(layer, head, used, shared);
  if (threadIdx.x > 0) return;
  layer.read_bytes[head.index] += count * TOKEN_BYTES;
  if (layer.report && count < layer.position_capacity) layer.report[head.index * layer.position_capacity + count] = -1;
  layer.pieces_done[head.index] = 0;
  layer.lengths[head.index] = head.length;
  if (layer.archive_lengths) ++layer.archive_lengths[head.index];
  if (head.index % layer.num_kv_heads == 0) ++layer.seen[head.row];
}
