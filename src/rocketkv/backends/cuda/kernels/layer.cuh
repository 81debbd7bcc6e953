// What the kernels of a decode step are given: the tensors of one layer, those of one token, and scratch memory.
// `Layer` in arguments.py has the same fields; backends/base.py and step.py describe the tensors.
#pragma once

#include "numbers.cuh"

struct Layer {
  // The token's tensors, dense, in T: [B, Hq, D] and [B, Hkv, D]; `report` is [B, Hkv, position_capacity] or null.
  const T *query, *key, *value;
  T* output;
  int* report;
  // What is stored. Keys and values are codes if there are exponents.
  void *keys, *values;
  signed char* exponents;
  int* positions;
  int64 *lengths, *archive_lengths, *seen;
  // The plan of each row.
  const int64 *num_channels, *top_k, *dense_lengths, *sinks, *recents;
  // The index, whose pointers are null where it lacks the tensor.
  T* bounds;
  const int64* page_size;
  unsigned char* codes;
  T *ranges, *open_keys;
  float* spread;
  const float* sink_logits;  // [Hq] or null
  // Scratch memory.
  float *logits, *partials;
  unsigned* scores;
  int* chosen;
  float *pieces, *states;
  int* pieces_done;
  int64* read_bytes;
  // Sizes.
  int64 token_capacity, position_capacity, num_blocks, num_units, num_parts, most_chosen;
  int num_kv_heads, num_rows, parts_per_block;
  int num_pieces, cluster;  // the blocks that attend: of a head, and of a cluster
  float scale, softcap;     // logits are not capped if the cap is 0
};

// A dot product times its scale, as the soft cap leaves it. See LogitTerms in ops/terms.py.
__device__ __forceinline__ float capped(float logit, float softcap) {
  return softcap > 0.0f ? softcap * tanhf(logit / softcap) : logit;
}

// One KV head of one row, as it is once the new token is stored.
struct Head {
  int64 index;
  int row, rank, length;  // the new token's rank
  bool selects;           // whether tokens are chosen; if not, all are attended to

  __device__ __forceinline__ Head(const Layer& layer, int64 head, bool is_dense)
      : index(head), row(head / layer.num_kv_heads), rank(layer.lengths[head]), length(rank + 1) {
    selects = !is_dense && length > layer.dense_lengths[row];
  }

  // The sink of a query head; minus infinity if there is none.
  __device__ __forceinline__ float sink_of(const Layer& layer, int group) const {
    return layer.sink_logits ? layer.sink_logits[index % layer.num_kv_heads * G + group] : -infinity();
  }

  // The slot of a kept token among all stored tokens of all heads.
  __device__ __forceinline__ int64 slot_of(const Layer& layer, int rank_of_token) const {
    const int slot =
        layer.archive_lengths ? layer.positions[index * layer.position_capacity + rank_of_token] : rank_of_token;
    return index * layer.token_capacity + slot;
  }
};
