// The last launch of a decode step: attend to the chosen tokens of a head, or to all. Each block has a piece of them; a
// cluster merges the pieces of its blocks into one, and the cluster that ends last merges those, if there are several,
// and counts the new token. Pieces are merged in their order.
//
// Grid: heads, pieces, chunks of HEADS query heads; clusters along the pieces. The kernel hands over
//   pieces       [heads][num_pieces / cluster][G][D]: the sum of a cluster's weighted values
//   states       [heads][num_pieces / cluster][2][G]: the largest logit of a cluster, and its sum of weights
//   pieces_done  [heads]: the number of clusters that are done, zero between steps
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

// A piece: the sums of the weighted values, and the states.
struct Piece {
  float sums[HEADS][D];
  State states[HEADS];
};

struct Shared {
  Piece warps[WARPS], block;
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
      if (lane == 0) shared.warps[warp].states[h] = {best[h], total[h]};
      for (int j = 0; j < NUMBERS; ++j)
        if (lane < ROW_LANES && channel_of(lane, j) < D) shared.warps[warp].sums[h][channel_of(lane, j)] = sums[h][j];
    }
  }
};

// One channel of pieces that are merged one after the other, beside a sink.
struct Merged {
  State state;
  float sum = 0.0f;

  __device__ __forceinline__ explicit Merged(float sink) {
    state.best = fmaxf(-MOST, sink);
    state.total = __expf(sink - state.best);
  }

  __device__ __forceinline__ void take(State other, float other_sum) {
    const float best = fmaxf(state.best, other.best);
    const float shrunk = __expf(state.best - best), weight = __expf(other.best - best);
    state = {best, shrunk * state.total + weight * other.total};
    sum = shrunk * sum + weight * other_sum;
  }
};

// Merge what the warps of a block have.
__device__ __forceinline__ void merge_warps(Shared& shared) {
  for (int i = threadIdx.x; i < HEADS * D; i += blockDim.x) {
    const int h = i / D, channel = i % D;
    Merged merged(-infinity());
    for (int w = 0; w < WARPS; ++w) merged.take(shared.warps[w].states[h], shared.warps[w].sums[h][channel]);
    shared.block.sums[h][channel] = merged.sum;
    if (channel == 0) shared.block.states[h] = merged.state;
  }
}

// Merge what `count` blocks of a cluster have, each block a share of the channels: into the output if no other cluster
// has tokens, or else into the cluster's piece.
__device__ __forceinline__ void merge_blocks(const Layer& layer, const Head& head, int rank, int count, bool is_whole,
                                             int first, const Shared& shared) {
  const int64 piece = (head.index * layer.num_pieces + blockIdx.y) / layer.cluster;
  for (int i = rank * blockDim.x + threadIdx.x; i < HEADS * D; i += layer.cluster * blockDim.x) {
    const int h = i / D, channel = i % D, g = first + h;
    if (g >= G || count <= 0) break;
    Merged merged(is_whole ? head.sink_of(layer, g) : -infinity());
    const State* state = &shared.block.states[h];
#pragma unroll 4
    for (int b = 0; b < count; ++b)
      merged.take({of_block(&state->best, b), of_block(&state->total, b)}, of_block(&shared.block.sums[h][channel], b));
    if (is_whole) {
      layer.output[(head.index * G + g) * D + channel] = from_float<T>(merged.sum / merged.state.total);
      continue;
    }
    layer.pieces[(piece * G + g) * D + channel] = merged.sum;
    if (channel > 0) continue;
    layer.states[piece * (2 * G) + g] = merged.state.best;
    layer.states[piece * (2 * G) + G + g] = merged.state.total;
  }
}

// Merge the pieces of a head's clusters into its output; a warp takes one query head at a time.
__device__ __forceinline__ void merge_pieces(const Layer& layer, const Head& head, int num_pieces, Shared& shared) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64 first = head.index * (layer.num_pieces / layer.cluster);
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
    merge_warps(shared);
  }
  wait_for_cluster();
  const int rank = blockIdx.y % layer.cluster, from_cluster_on = used - static_cast<int>(blockIdx.y) + rank;
  const bool is_whole = used <= layer.cluster;
  merge_blocks(layer, head, rank, min(from_cluster_on, layer.cluster), is_whole, first, shared);
  __threadfence();     // what this block has stored comes before the count of its cluster
  wait_for_cluster();  // no block ends while others read its memory
  if (rank > 0) return;
  const int clusters = layer.num_pieces / layer.cluster * HEAD_CHUNKS;
  if (threadIdx.x == 0) shared.is_last = atomicAdd(layer.pieces_done + head.index, 1) == clusters - 1;
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();
  if (!is_whole) merge_pieces(layer, head, (used + layer.cluster - 1) / layer.cluster, shared);
  if (threadIdx.x > 0) return;
  layer.read_bytes[head.index] += count * TOKEN_BYTES;
  if (layer.report && count < layer.position_capacity) layer.report[head.index * layer.position_capacity + count] = -1;
  layer.pieces_done[head.index] = 0;
  layer.lengths[head.index] = head.length;
  if (layer.archive_lengths) ++layer.archive_lengths[head.index];
  if (head.index % layer.num_kv_heads == 0) ++layer.seen[head.row];
}
