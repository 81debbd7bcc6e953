// The kernels and what they are given. The library is compiled once for each instruction set; see CMakeLists.txt.
#pragma once

#include <cstdint>

namespace rocketkv {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

// How the tokens of a row are scored before the best are chosen. A method is one case of `Step::score`.
enum class Scoring {
  kDense,   // attend to everything
  kPages,   // bounds of pages along the query's largest channels (RocketKV, SparQ)
  kBounds,  // upper bounds of pages along all channels (Quest)
  kExact,   // the true logits
  kLowBit,  // low-bit keys along the query's largest channels
};

constexpr int kBlockPages = 32;  // pages side by side in the index: one cache line of a channel in 16 bits

// The page bounds, [B, Hkv, blocks, C, kBlockPages]: channel-major within a block of pages, so that an unread channel is
// a cache line not read. C is 2 D, minima then maxima, or D where all pages hold one token.
struct Pages {
  void* bounds = nullptr;
  const int64_t* page_size = nullptr;  // [B]
  int64_t num_blocks = 0;              // allocated
  int num_rows = 0;                    // C
  float* spread = nullptr;             // [B, Hkv, D] by which channels are chosen; null: by the query alone
};

constexpr int kGroup = 64;        // tokens quantized together
constexpr int kBlockGroups = 16;  // groups side by side: the ranges of a channel are one cache line in 16 bits

// The keys in 4 bits: codes [B, Hkv, blocks, D, kBlockGroups, kGroup / 2], ranges [B, Hkv, blocks, D, kBlockGroups, 2],
// and those of each row's last, not yet full group as they are, [B, Hkv, D, kGroup].
struct LowBitKeys {
  uint8_t* codes = nullptr;
  void *ranges = nullptr, *open_keys = nullptr;
  int64_t num_blocks = 0;  // allocated
  float* spread = nullptr;  // [B, Hkv, D] by which channels are chosen
};

constexpr int kStepChannels = 32;  // that share a step where keys and values are stored in 8 bits

// One layer's storage and plan: everything about a decode step that stays the same while no buffer grows.
struct Layer {
  Dtype dtype;
  int batch, num_kv_heads, num_heads, head_dim;
  float scale;

  void *keys, *values;       // [B, Hkv, token_capacity, D], int8 if there are
  int8_t* exponents;         // [B, Hkv, token_capacity, 2, steps of a row], or null
  int64_t token_capacity;
  int32_t* positions;        // [B, Hkv, position_capacity]
  int64_t position_capacity;
  bool archived;             // keys and values lie at `positions`; otherwise side by side
  int64_t* lengths;          // [B, Hkv] tokens to choose from; grows by one
  int64_t* archive_lengths;  // [B, Hkv] tokens in the archive or null; grows by one
  int64_t* seen;             // [B] tokens seen; grows by one

  Scoring scoring;
  Pages pages;         // of kPages and kBounds
  LowBitKeys lowbit;   // of kLowBit
  const int64_t *num_channels, *top_k, *sinks, *recents;  // [B]
  const int64_t* dense_lengths;  // [B] >= top_k; up to so many tokens are attended in full
};

// One token per row: query [B, Hq, D], key and value [B, Hkv, D], output [B, Hq, D], all dense in the layer's dtype.
struct Token {
  const void *query, *key, *value;
  void* output;
  int32_t* chosen;  // [B, Hkv, position_capacity] places chosen, -1 after the last; or null
};

struct Linear {
  Dtype dtype;                // of all three
  const void* weight;         // [num_out, num_in]
  const void* input;          // [num_rows, num_in]
  void* output;               // [num_rows, num_out]
  int64_t num_rows, num_in, num_out;
};

// Append a token to every row, score, choose, attend. Returns the bytes of keys, values and index that it read.
int64_t decode_step(const Layer& layer, const Token& token, int num_threads);

// The keys that an index is built from: [B, Hkv, S, D], rows dense, with strides in elements between rows and heads.
struct Keys {
  Dtype dtype;
  int batch, num_kv_heads, head_dim;
  const void* keys;
  int64_t batch_stride, head_stride;
  const int64_t* lengths;  // [B, Hkv]
};

// Let empty pages take in all keys.
void build_pages(const Keys& keys, const Pages& pages, int num_threads);

// output = input @ weight^T, for few rows.
void multiply(const Linear& linear, int num_threads);

}  // namespace rocketkv
