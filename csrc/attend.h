// Attention of a task's queries over its chosen tokens.
#pragma once

#include <cmath>

#include "dot.h"
#include "restore.h"
#include "softcap.h"
#include "view.h"

namespace rocketkv {
namespace {  // see view.h

constexpr int kRowsAhead = 32;    // rows of keys or values between a prefetch and its use
constexpr int kTokensAhead = 16;  // tokens stored in 8 bits between a prefetch and its use

template <class T>
struct Attention {
  // Attend to one piece of a task's tokens and write the state that `merge` needs. Return the bytes that were read.
  static int64_t attend(const View<T>& view, HeadTask& task, int64_t piece) {
    int64_t begin = task.num_chosen * piece / view.num_pieces, end = task.num_chosen * (piece + 1) / view.num_pieces;
    float* states = task.pieces + piece * view.group * (2 + view.padded);
    for (int g = 0; g < view.group; ++g) {
      float* state = states + g * (2 + view.padded);
      std::fill(state, state + 2 + view.padded, 0.0f);
      state[0] = -kInfinity;
    }
    if (begin == end) return 0;  // fewer tokens than pieces
    const Operand<T>* query = view.query_operands(task);
    const bool is_int8 = view.layer.exponents;
    const T* keys = is_int8 ? view.tile_memory() : view.stored(view.layer.keys, task, 0);
    const T* values = is_int8 ? keys + kTile * view.layer.head_dim : view.stored(view.layer.values, task, 0);
    int64_t rows[2 * kTile];  // where the rows of a tile and of the next begin; in 8 bits, their slots
    auto locate = [&](int64_t from, int64_t* out) {
      for (int i = 0; i < kTile; ++i) {
        int64_t rank = std::min(from + i, end - 1);
        out[i] = view.slot_at(task, task.selects ? task.chosen[rank] : rank) * (is_int8 ? 1 : view.layer.head_dim);
      }
    };
    locate(begin, rows + kTile);
    if (is_int8) {
      const Codes codes = view.codes_of(task);
      for (int i = kTile; i < kTile + kTokensAhead; ++i) codes.fetch(rows[i]);
    } else {
      for (int i = kTile; i < kTile + kRowsAhead; ++i) fetch(keys + rows[i], view.layer.head_dim);
    }
    for (int64_t start = begin; start < end; start += kTile) {
      int n = static_cast<int>(std::min<int64_t>(kTile, end - start));
      std::copy_n(rows + kTile, kTile, rows);
      locate(start + kTile, rows + kTile);
      if (is_int8) restore_tile(view, view.codes_of(task), rows, n);
      for (int h = 0; h < view.group; h += kMaxHeads)
        with_heads(view.group - h, [&](auto heads) {
          attend_tile<heads>(view, keys, values, rows, n, query + h * view.padded, states + h * (2 + view.padded),
                             h == 0 && !is_int8);
        });
    }
    return (end - begin) * view.token_bytes();
  }

  // Join the pieces of a task, and the sinks of its query heads, and write its output.
  static void merge(const View<T>& view, const HeadTask& task) {
    int64_t stride = 2 + view.padded;
    T* output = static_cast<T*>(view.token.output) + task.index * view.group * view.layer.head_dim;
    std::vector<float>& sums = Scratch<T>::mine().sums;
    const float* sinks = view.sinks_of(task);
    for (int g = 0; g < view.group; ++g) {
      float top = sinks ? sinks[g] : -kInfinity;
      for (int64_t p = 0; p < view.num_pieces; ++p) top = std::max(top, task.pieces[(p * view.group + g) * stride]);
      float total = sinks ? std::exp(sinks[g] - top) : 0.0f;
      sums.assign(view.padded, 0.0f);
      for (int64_t p = 0; p < view.num_pieces; ++p) {
        const float* state = task.pieces + (p * view.group + g) * stride;
        float weight = std::exp(state[0] - top);
        total += weight * state[1];
        for (int c = 0; c < view.padded; ++c) sums[c] += weight * state[2 + c];
      }
      for (int c = 0; c < view.padded; c += kPair) {
        Pair pair = RowPair<T>::sums_in_order(load_pair(sums.data() + c));
        store(sums.data() + c, pair.a);
        store(sums.data() + c + kWidth, pair.b);
      }
      for (int c = 0; c < view.layer.head_dim; ++c)
        output[g * view.layer.head_dim + c] = from_float<T>(sums[c] / total);
    }
  }

 private:
  static ROCKETKV_INLINE void fetch(const T* row, int count) { prefetch(row, count * static_cast<int>(sizeof(T))); }

  // Fetches each row of a tile kRowsAhead rows before it is used, and after the last one the rows that are used next.
  struct RowFetcher {
    const T* base;
    const int64_t* rows;
    int n, count;  // rows of the tile, channels of each that are fetched
    const T* next_base;
    const int64_t* next_rows;
    int next_count;
    bool is_on;
    ROCKETKV_INLINE void fetch_for(int i) const {
      i += kRowsAhead;
      if (is_on) i < n ? fetch(base + rows[i], count) : fetch(next_base + next_rows[i - n], next_count);
    }
  };

  // Restore a tile's keys and values into its memory. `rows` gives their slots, and afterwards where they lie in that
  // memory. The codes of the tokens kTokensAhead further on are fetched.
  static void restore_tile(const View<T>& view, const Codes& codes, int64_t* rows, int n) {
    T *keys = view.tile_memory(), *values = keys + kTile * codes.dim;
    for (int i = 0; i < n; ++i) {
      const int64_t slot = rows[i], ahead = i + kTokensAhead;
      codes.fetch(rows[ahead < n ? ahead : ahead + kTile - n]);
      rows[i] = static_cast<int64_t>(i) * codes.dim;
      restore_row(codes.key(slot), codes.key_exponents(slot), codes.dim, keys + rows[i]);
      restore_row(codes.value(slot), codes.value_exponents(slot), codes.dim, values + rows[i]);
    }
    for (int i = n; i < kTile; ++i) rows[i] = rows[n - 1];
  }

  // A value's weight is the sum of kTerms operands, because the error of one bfloat16 operand would show beside the
  // rounding of the output.
  static constexpr int kTerms = std::is_same_v<Operand<T>, float> ? 1 : 2;

  // Store the weights of kWidth values, and return them as they were stored.
  template <int H>
  static ROCKETKV_INLINE Vec store_weights(Operand<T> (&weights)[kTerms][H][kTile], int h, int i, Vec rest) {
    Vec sum = {};
    for (int term = 0; term < kTerms; ++term) {
      Vec stored = store_operands(&weights[term][h][i], rest);
      rest -= stored;
      sum += stored;
    }
    return sum;
  }

  // Attend to the n tokens of a tile for H query heads, and update their running maxima, sums and weighted values.
  template <int H>
  static void attend_tile(const View<T>& view, const T* keys, const T* values, const int64_t* rows, int n,
                          const Operand<T>* query, float* states, bool fetches) {
    constexpr int N = rows_at_once(H);
    const int dim = view.layer.head_dim;
    auto width_at = [&](int c) { return c + kChunks * kPair <= dim ? kChunks * kPair : std::min(kPair, dim - c); };
    float logits[H][kTile + N], corrections[H];
    Operand<T> weights[kTerms][H][kTile];
    const RowFetcher fetcher{keys, rows, n, dim, values, rows, width_at(0), fetches};
    for (int i = 0; i < n; i += N) {
      const T* tile_rows[N];
      for (int j = 0; j < N; ++j) tile_rows[j] = keys + rows[i + j];
      for (int j = 0; j < N; ++j) fetcher.fetch_for(i + j);
      float products[kSums];
      dot_rows<H, false>(tile_rows, query, view.padded, dim, products);
      for (int h = 0; h < H; ++h) std::memcpy(&logits[h][i], products + h * N, N * sizeof(float));
    }
    const float softcap = view.layer.terms.softcap, scale = softcap > 0 ? 1.0f : view.layer.scale;
    for (int h = 0; h < H; ++h) {
      float* state = states + h * (2 + view.padded);
      if (softcap > 0) cap(logits[h], n, view.layer.scale / softcap, softcap);
      for (int i = n; i < round_up(n, kWidth); ++i) logits[h][i] = -kInfinity;
      Vec best = broadcast(state[0]), sum = {};
      for (int i = 0; i < n; i += kWidth) {
        Vec scaled = load<Vec>(&logits[h][i]) * scale;
        best = max(scaled, best);  // no NaN
        store(&logits[h][i], scaled);
      }
      const float top = max_lane(best), base = top == -kInfinity ? 0.0f : top;  // a tile that weighs nothing: no NaN
      for (int i = 0; i < n; i += kWidth)
        sum +=
            store_weights<H>(weights, h, i, exp_of_negative(load<Vec>(&logits[h][i]) - base));  // as they were stored
      corrections[h] = std::exp(state[0] - base);
      state[0] = top;
      state[1] = state[1] * corrections[h] + sum_lane(sum);
    }
    for (int c = 0, width; c < dim; c += width) {
      width = width_at(c);
      const bool is_last = c + width == dim;
      const RowFetcher fetcher{values + c,
                               rows,
                               n,
                               width,
                               is_last ? keys : values + c + width,
                               is_last ? rows + kTile : rows,
                               is_last ? dim : width_at(c + width),
                               fetches};
      if (width == kChunks * kPair) {
        add_values<H, kChunks>(view, fetcher, weights, corrections, states + 2 + c);
      } else {
        add_values<H, 1>(view, fetcher, weights, corrections, states + 2 + c);
      }
    }
  }

  // Add a tile's weighted values to the running ones, in C chunks of channels, or in a part of one.
  template <int H, int C>
  static void add_values(const View<T>& view, const RowFetcher& fetcher, const Operand<T> (&weights)[kTerms][H][kTile],
                         const float* corrections, float* states) {
    const int stride = 2 + view.padded, n = fetcher.n, count = fetcher.count;
    const T* values = fetcher.base;
    const int64_t* rows = fetcher.rows;
    Pair sums[H][C];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 2
      for (int k = 0; k < C; ++k) {
        const float* state = states + h * stride + k * kPair;
        sums[h][k] = {load<Vec>(state) * corrections[h], load<Vec>(state + kWidth) * corrections[h]};
      }
    auto add = [&](const RowPair<T>& value, int i, int k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h)
#pragma GCC unroll 2
        for (int term = 0; term < kTerms; ++term) value.add_weighted(&weights[term][h][i], sums[h][k]);
    };
    int i = 0;
    if (count == C * kPair) {
      for (; i + 1 < n; i += 2) {
        const T *a = values + rows[i], *b = values + rows[i + 1];
        fetcher.fetch_for(i), fetcher.fetch_for(i + 1);
#pragma GCC unroll 2
        for (int k = 0; k < C; ++k) add({a + k * kPair, b + k * kPair}, i, k);
      }
      if (i < n)
        for (int k = 0; k < C; ++k) add(RowPair<T>(values + rows[i] + k * kPair), i, k);
    } else {
      for (; i < n; i += 2) {
        Part<T> a(values + rows[i], count), b(values + rows[i + 1], i + 1 < n ? count : 0);
        for (int j = i; j < std::min(i + 2, n); ++j) fetcher.fetch_for(j);
        add({a.numbers, b.numbers}, i, 0);
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 2
      for (int k = 0; k < C; ++k) {
        float* state = states + h * stride + k * kPair;
        store(state, sums[h][k].a);
        store(state + kWidth, sums[h][k].b);
      }
  }
};

}  // namespace
}  // namespace rocketkv
