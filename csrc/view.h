// What the parts of one decode step share: the task of one head, a thread's own memory, and the places of tensors.
//
// view.h, score_*.h, choose.h and attend.h are parts of step.cpp, and no other file includes them. Their names are
// local to that file, because GCC then inlines functions that are called once.
#pragma once

#include <atomic>
#include <limits>
#include <vector>

#include "channels.h"
#include "int8.h"
#include "kernels.h"
#include "pairs.h"
#include "prefetcher.h"

namespace rocketkv {
namespace {

constexpr int kTile = 32;                    // tokens attended between two updates of the running softmax
constexpr int kChunks = kWidth > 8 ? 2 : 1;  // chunks of kPair numbers handled at once: the registers hold their sums
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The work on one KV head of one row. Its tokens are counted by rank: the kept ones in order, then the new one.
struct HeadTask {
  int64_t index, row;  // b * Hkv + h, b
  int64_t length;      // tokens to choose from, the new one included
  bool selects;        // false: all tokens are attended
  int64_t page_size;   // tokens of a unit; a unit is what has one score, a page or a token
  int64_t num_units;   // 0 if all tokens are attended
  int64_t num_chosen;  // tokens that are attended
  float* logits;       // [G][unit_stride]
  int32_t* chosen;     // [num_chosen] ranks, ascending; unused where all tokens are attended
  float* pieces;       // [num_pieces][G][2 + padded]: maximum, sum, weighted values
  std::atomic<int> scores_left, pieces_left;
  std::atomic<bool> is_ready;  // `chosen` is written
};

// The memory that a thread reuses from step to step.
template <class T>
struct Scratch {
  std::vector<float> floats, sums, weights;
  std::vector<int32_t> ranks;
  std::vector<T> restored;        // rows that were stored in 8 bits: a tile's keys and values, or one of each
  std::vector<Operand<T>> query;  // [G][padded] of one task
  QueryChannels<T> channels[2];   // of the present task and of the next
  Prefetcher<T> prefetcher;

  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

// The sizes of a step, and the places of its tensors.
template <class T>
struct View {
  const Layer& layer;
  const Token& token;
  int64_t num_tasks;                            // rows times KV heads
  int group;                                    // query heads of a KV head
  int padded;                                   // head_dim, up to whole pairs
  bool is_shared = false;                       // several threads work on one task
  int64_t num_score_parts = 1, num_pieces = 1;  // what scoring and attention of a task are divided into
  int64_t unit_stride = 0;                      // from one query head's logits to the next's

  View(const Layer& layer, const Token& token)
      : layer(layer),
        token(token),
        num_tasks(static_cast<int64_t>(layer.batch) * layer.num_kv_heads),
        group(layer.num_heads / layer.num_kv_heads),
        padded(round_up(layer.head_dim, kPair)) {}

  // The bytes of one token's stored key and value.
  int64_t token_bytes() const {
    return 2 * (layer.exponents ? layer.head_dim + num_steps(layer.head_dim) : layer.head_dim * sizeof(T));
  }
  // The key or the value at a slot, [D]; `tokens` is the layer's keys or values.
  T* stored(void* tokens, const HeadTask& task, int64_t slot) const {
    return static_cast<T*>(tokens) + (task.index * layer.token_capacity + slot) * layer.head_dim;
  }
  int64_t slot_at(const HeadTask& task, int64_t rank) const {
    return layer.archived ? layer.positions[task.index * layer.position_capacity + rank] : rank;
  }
  // The codes of a task's tokens, by slot.
  Codes codes_of(const HeadTask& task) const {
    const int dim = layer.head_dim, steps = num_steps(dim);
    const int64_t slots = task.index * layer.token_capacity;
    return {static_cast<int8_t*>(layer.keys) + slots * dim, static_cast<int8_t*>(layer.values) + slots * dim,
            layer.exponents + slots * 2 * steps, dim, steps};
  }
  // This thread's memory for the restored keys, then the values, of a tile.
  T* tile_memory() const {
    Scratch<T>::mine().restored.resize(2 * kTile * layer.head_dim);
    return Scratch<T>::mine().restored.data();
  }

  // The new key or value, [D]; `rows` is the token's keys or values.
  const T* new_row(const void* rows, const HeadTask& task) const {
    return static_cast<const T*>(rows) + task.index * layer.head_dim;
  }
  const T* query_of(const HeadTask& task) const {  // [G][D]
    return static_cast<const T*>(token.query) + task.index * group * layer.head_dim;
  }
  // The sinks of the task's query heads, [G], or null.
  const float* sinks_of(const HeadTask& task) const {
    const float* sinks = layer.terms.sink_logits;
    return sinks ? sinks + task.index % layer.num_kv_heads * group : nullptr;
  }
  // The task's queries as operands, [G][padded]; they last until this thread asks for another task's.
  const Operand<T>* query_operands(const HeadTask& task) const {
    std::vector<Operand<T>>& out = Scratch<T>::mine().query;
    out.resize(group * padded);
    for (int g = 0; g < group; ++g)
      prepare_operands<T>(query_of(task) + g * layer.head_dim, layer.head_dim, out.data() + g * padded);
    return out.data();
  }
};

}  // namespace
}  // namespace rocketkv
