// The first launch of a decode step: store the new token, and let the index take it in; then score the units of a head.
//
// A unit is what has a score: a page, or a token where each token is scored. A part is the units that a warp scores at
// a time. Grid: heads, blocks of parts. For a scoring other than DENSE the kernel writes, for each part and query head,
//   logits    [heads][G][num_units]
//   partials  [heads][num_parts][2][G]: the largest logit of the part, and its tokens' sum of exponentials relative to
//   it
#include "channels.cuh"
#include "layer.cuh"
#include "lowbit.cuh"
#include "pages.cuh"
#include "rows.cuh"

enum Scoring { DENSE, EXACT, PAGES, BOUNDS, LOWBIT };

constexpr int WARPS = 4;
constexpr bool IS_CHOOSY = SCORING == PAGES || SCORING == LOWBIT;  // scores along the largest channels alone
constexpr int UNITS_OF_LANE = SCORING == LOWBIT ? 2 : 1;
constexpr int PART = UNITS_OF_LANE * WARP;
static_assert(SCORING != LOWBIT || PART == GROUP, "a part is a group");
constexpr int CHUNKS = (G + 7) / 8;
constexpr int H = SCORING == EXACT ? HEADS : (G + CHUNKS - 1) / CHUNKS;  // query heads scored at once
constexpr int MOST_ROWS = SCORING == BOUNDS ? 2 * D : SCORING == PAGES || SCORING == LOWBIT ? D : 1;

struct Shared {
  Channels channels;
  int rows[MOST_ROWS];                                               // the rows of the index that are read
  alignas(16) float queries[MOST_ROWS * H];                          // the queries' numbers at these rows
  alignas(16) float weights[SCORING == LOWBIT ? WARPS * D * H : 1];  // the weights of the codes of a warp's group
  T key[D];                                                          // the new key as later steps will read it
};

// Store the new token behind all others of its head.
__device__ __forceinline__ void append(const Layer& layer, const Head& head, int page_size, Shared& shared) {
  const int64 slot = head.index * layer.token_capacity +
                     (layer.archive_lengths ? layer.archive_lengths[head.index] : static_cast<int64>(head.rank));
  const T *key = layer.key + head.index * D, *value = layer.value + head.index * D;
#if INT8
  signed char* keys = static_cast<signed char*>(layer.keys) + slot * D;
  signed char* values = static_cast<signed char*>(layer.values) + slot * D;
  signed char* exponents = layer.exponents + slot * (2 * NUM_STEPS);
  const int lane = threadIdx.x % WARP;
  for (int first = threadIdx.x / WARP * STEP_CHANNELS; first < D; first += WARPS * STEP_CHANNELS) {
    const T stored = store_in_8_bits(key, first, lane, keys, exponents);
    if (first + lane < D) shared.key[first + lane] = stored;
    store_in_8_bits(value, first, lane, values, exponents + NUM_STEPS);
  }
#else
  for (int c = threadIdx.x; c < D; c += blockDim.x) {
    static_cast<T*>(layer.keys)[slot * D + c] = shared.key[c] = key[c];
    static_cast<T*>(layer.values)[slot * D + c] = value[c];
  }
#endif
  if (threadIdx.x == 0)
    layer.positions[head.index * layer.position_capacity + head.rank] = static_cast<int>(layer.seen[head.row]);
  __syncthreads();
  if (SCORING == PAGES || SCORING == BOUNDS) fold_key(layer, head.index, head.rank / page_size, shared.key);
  if (SCORING == LOWBIT) append_lowbit(layer, head, shared.key);
}

// The bytes that the scoring of a head reads.
__device__ __forceinline__ int64 scored_bytes(const Layer& layer, const Head& head, int64 units) {
  const int64 count = layer.num_channels[head.row], spread_bytes = layer.spread ? 4 * D : 0;
  if (SCORING == EXACT) return head.length * static_cast<int64>(D * sizeof(T));
  if (SCORING == BOUNDS) return units * layer.num_rows * sizeof(T);
  if (SCORING == PAGES) return units * count * sizeof(T) + spread_bytes;
  return count * (head.length / GROUP * (HALF + 2 * sizeof(T)) + head.length % GROUP * sizeof(T)) + spread_bytes;
}

// Find which rows of the index are read; return their number.
__device__ __forceinline__ int choose_rows(const Layer& layer, const Head& head, const T* queries, Shared& shared) {
  const int count = IS_CHOOSY ? static_cast<int>(layer.num_channels[head.row]) : layer.num_rows;
  const float* spread = layer.spread ? layer.spread + head.index * D : nullptr;
  if (IS_CHOOSY) choose_channels(queries, spread, count, shared.channels);
  if (SCORING == PAGES) set_temperatures(queries, spread, count, layer.scale, shared.channels);
  for (int r = threadIdx.x; r < count; r += blockDim.x) {
    int row = IS_CHOOSY ? shared.channels.chosen[r] : r;
    if (SCORING == PAGES && layer.num_rows > D) {  // the maximum is read where the sum of the heads is positive
      float sum = 0.0f;
      for (int g = 0; g < G; ++g) sum += to_float(queries[g * D + row]);
      if (sum > 0.0f) row += D;
    }
    shared.rows[r] = row;
  }
  __syncthreads();
  return count;
}

// Load the numbers of H queries from `first` on at the rows that are read.
__device__ __forceinline__ void load_queries_at(const Layer& layer, const T* queries, int first, int count,
                                                Shared& shared) {
  for (int i = threadIdx.x; i < count * H; i += blockDim.x) {
    const int row = shared.rows[i / H], head = first + i % H;
    float number = head < G ? to_float(queries[head * D + row % D]) : 0.0f;
    if (SCORING == BOUNDS && layer.num_rows > D)  // minima count where the query is negative, maxima where positive
      number = (row < D ? number > 0.0f : number < 0.0f) ? 0.0f : number;
    shared.queries[i] = number;
  }
  __syncthreads();
}

// The dot products of H queries with the whole keys of a part; a lane gets one token.
template <int H>
__device__ __forceinline__ void exact_products(const Layer& layer, const Head& head, int part,
                                               const float (&queries)[HEADS][NUMBERS], int lane,
                                               float (&products)[2][H]) {
#pragma unroll 4
  for (int i = 0; i < ROW_LANES; ++i) {  // ROWS tokens at a time
    const int rank = part * PART + i * ROWS + lane / ROW_LANES;
    const bool is_there = rank < head.length;
    Row<Stored> stored;
    stored.load(layer.keys, layer.exponents, 0, is_there ? head.slot_of(layer, rank) : 0, is_there, lane);
    float key[NUMBERS];
    stored.unpack(key);
#pragma unroll
    for (int h = 0; h < least(H, HEADS); ++h) {  // a lane's token is in the rows of other lanes
      const float product = __shfl_sync(ALL, dot(queries[h], key), lane % ROWS * ROW_LANES);
      if (lane / ROWS == i) products[0][h] = product;
    }
  }
}

// Store a part's logits for H query heads from `first` on, the largest of each, and its sum of exponentials.
__device__ __forceinline__ void store_logits(const Layer& layer, const Head& head, int part, int units, int page_size,
                                             int first, int lane, float (&logits)[2][H]) {
#pragma unroll
  for (int h = 0; h < H; ++h) {
    if (first + h >= G) break;
    float best = -MOST, total = 0.0f;
    for (int i = 0; i < UNITS_OF_LANE; ++i) {
      const int unit = part * PART + i * WARP + lane;
      if (unit < units) best = fmaxf(best, logits[i][h]);
    }
    best = most_of_lanes(best);
    for (int i = 0; i < UNITS_OF_LANE; ++i) {
      const int unit = part * PART + i * WARP + lane;
      if (unit >= units) continue;
      layer.logits[(head.index * G + first + h) * layer.num_units + unit] = logits[i][h];
      total += __expf(logits[i][h] - best) * min(page_size, head.length - unit * page_size);
    }
    total = sum_lanes(total);
    float* partial = layer.partials + (head.index * layer.num_parts + part) * (2 * G) + first + h;
    if (lane == 0) partial[0] = best, partial[G] = total;
  }
}

extern "C" __global__ void __launch_bounds__(WARPS* WARP) append_and_score(const Layer __grid_constant__ layer) {
  __shared__ Shared shared;
  let_next_start();
  const Head head(layer, blockIdx.x, SCORING == DENSE);
  const int page_size = layer.page_size ? static_cast<int>(layer.page_size[head.row]) : 1;
  const int units = (head.length + page_size - 1) / page_size, parts = (units + PART - 1) / PART;
  const int begin = blockIdx.y * layer.parts_per_block, end = min(begin + layer.parts_per_block, parts);
  if (begin >= parts) return;
  if (SCORING == DENSE ? blockIdx.y == 0 : end == parts) {  // the block that scores the new token stores it first
    append(layer, head, page_size, shared);
    if (threadIdx.x == 0) layer.read_bytes[head.index] = head.selects ? scored_bytes(layer, head, units) : 0;
    __syncthreads();
  }
  if (!head.selects) return;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const T* queries = layer.query + head.index * (G * D);
  const int count = SCORING == EXACT ? 0 : choose_rows(layer, head, queries, shared);
  for (int first = 0; first < G; first += H) {
    float own[HEADS][NUMBERS];
    if (SCORING == EXACT) load_queries(queries, first, lane, own);
    if (SCORING != EXACT) load_queries_at(layer, queries, first, count, shared);
    for (int part = begin + warp; part < end; part += WARPS) {
      float logits[2][H];
      if (SCORING == LOWBIT)
        lowbit_products<H>(layer, head, part, count, shared.rows, shared.queries, shared.weights + warp * (D * H), lane,
                           logits);
      if (SCORING == PAGES || SCORING == BOUNDS)
        page_products<H>(layer, head, part, count, shared.rows, shared.queries, lane, logits);
      if (SCORING == EXACT) exact_products<H>(layer, head, part, own, lane, logits);
#pragma unroll
      for (int h = 0; h < H; ++h) {
        const float scale = SCORING == PAGES ? shared.channels.temperatures[min(first + h, G - 1)] : layer.scale;
#pragma unroll
        for (int i = 0; i < UNITS_OF_LANE; ++i) logits[i][h] = capped(logits[i][h] * scale, layer.softcap);
      }
      store_logits(layer, head, part, units, page_size, first, lane, logits);
    }
    __syncthreads();  // the next queries take the place of these
  }
}
