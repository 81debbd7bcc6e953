// The kernels and their arguments. The library is compiled once for each instruction set; see CMakeLists.txt.
#pragma once

#include <cstdint>

namespace rocketkv {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

// How the tokens of a row are scored before the best are chosen. Each scoring but kDense is a class in score_*.h.
enum class Scoring {
  kDense,   // no scores: all tokens are attended to
  kPages,   // bounds of pages along the query's largest channels (RocketKV, SparQ)
  kBounds,  // upper bounds of pages along all channels (Quest)
  kExact,   // the true logits
  kLowBit,  // low-bit keys along the query's largest channels
};

// Python has the constants below, too, in ops/pages.py, ops/lowbit.py and ops/int8.py. module.cpp exports them,
// and a test holds them equal.

constexpr int kPagesPerBlock = 32;  // pages side by side in the index: one cache line of a channel in 16 bits

// The page bounds, [B, Hkv, blocks, C, kPagesPerBlock], are channel-major within a block of pages, so that an unread
// channel is a cache line not read. C is 2 D, minima then maxima, or D if every page has one token.
struct Pages {
  void* bounds = nullptr;
  const int64_t* page_size = nullptr;  // [B] tokens
  int64_t num_blocks = 0;              // allocated
  int num_rows = 0;                    // C
  float* spread = nullptr;             // [B, Hkv, D] by which channels are chosen; null: by the query alone
};

constexpr int kGroup = 64;           // tokens quantized together
constexpr int kGroupsPerBlock = 16;  // groups side by side: the ranges of a channel are one cache line in 16 bits
constexpr int kLevels = 15;          // the largest code

// The keys in 4 bits: codes [B, Hkv, blocks, D, kGroupsPerBlock, kGroup / 2], ranges [B, Hkv, blocks, D,
// kGroupsPerBlock, 2], and the keys of each row's last, not yet full group as they came, [B, Hkv, D, kGroup].
struct LowBitKeys {
  uint8_t* codes = nullptr;
  void *ranges = nullptr, *open_keys = nullptr;
  int64_t num_blocks = 0;   // allocated
  float* spread = nullptr;  // [B, Hkv, D] by which channels are chosen
};

constexpr int kStepChannels = 32;  // channels that share a step where keys and values are stored in 8 bits
constexpr int kNotFinite = -128;   // the exponent of a step whose channels are not all finite

// What stands between the dot products of a layer and its weights, beside the scale; see ops/terms.py.
struct LogitTerms {
  const float* sink_logits = nullptr;  // [Hq] a logit more in each query head's softmax, or null
  float softcap = 0;                   // a logit becomes softcap * tanh(logit / softcap); 0: it stays as it is
};

// One layer's buffers and parameters, which stay fixed from token to token until a buffer is reallocated.
struct Layer {
  Dtype dtype = Dtype::kFloat32;
  int batch = 0, num_kv_heads = 0, num_heads = 0, head_dim = 0;
  float scale = 0;
  LogitTerms terms;

  void *keys = nullptr, *values = nullptr;  // [B, Hkv, token_capacity, D], int8 if there are exponents
  int8_t* exponents = nullptr;              // [B, Hkv, token_capacity, 2, steps of a row], or null
  int64_t token_capacity = 0;
  int32_t* positions = nullptr;  // [B, Hkv, position_capacity]
  int64_t position_capacity = 0;
  bool archived = false;               // keys and values lie at `positions`; otherwise side by side
  int64_t* lengths = nullptr;          // [B, Hkv] tokens to choose from; a step adds one
  int64_t* archive_lengths = nullptr;  // [B, Hkv] tokens in the archive, or null; a step adds one
  int64_t* seen = nullptr;             // [B] tokens seen; a step adds one

  Scoring scoring = Scoring::kDense;
  Pages pages;                             // the index of kPages and kBounds
  LowBitKeys lowbit;                       // the index of kLowBit
  const int64_t* num_channels = nullptr;   // [B] channels by which tokens are scored
  const int64_t* top_k = nullptr;          // [B] tokens that are attended
  const int64_t* sinks = nullptr;          // [B] first tokens that are always attended
  const int64_t* recents = nullptr;        // [B] last tokens that are always attended
  const int64_t* dense_lengths = nullptr;  // [B] >= top_k; up to so many tokens are all attended
};

// One token per row, all tensors dense in the layer's dtype. Without a key the token is in the cache already, and the
// step only reads.
struct Token {
  const void* query = nullptr;                  // [B, Hq, D]
  const void *key = nullptr, *value = nullptr;  // [B, Hkv, D]
  void* output = nullptr;                       // [B, Hq, D]
  int32_t* chosen = nullptr;                    // [B, Hkv, position_capacity] ranks chosen, -1 after the last; or null
};

// A matrix product, all tensors dense in `dtype`.
struct Linear {
  Dtype dtype = Dtype::kFloat32;
  const void* weight = nullptr;  // [num_out, num_in]
  const void* input = nullptr;   // [num_rows, num_in]
  void* output = nullptr;        // [num_rows, num_out]
  int64_t num_rows = 0, num_in = 0, num_out = 0;
};

// Append a token to every row, score, choose and attend. Return the bytes of keys, values and index that were read.
int64_t decode_step(const Layer& layer, const Token& token, int num_threads);

// Rows of numbers, [B, H, S, D]: a row is dense, the strides are in numbers.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;

  template <class T>
  const T* at(int64_t row, int64_t head, int64_t token) const {
    return static_cast<const T*>(data) + row * batch_stride + head * head_stride + token * token_stride;
  }
};

// A prompt, or the next turn of a conversation. A row's last column is its last token, the newest in its keys.
struct Prompt {
  Dtype dtype = Dtype::kFloat32;
  int batch = 0, num_kv_heads = 0, num_heads = 0, head_dim = 0;
  int64_t num_tokens = 0;  // columns of the query, T
  float scale = 0;
  LogitTerms terms;
  Rows query, output;                    // [B, Hq, T, D]
  Rows keys, values;                     // [B, Hkv, S, D]
  const int64_t* lengths = nullptr;      // [B, Hkv] keys of each row, the new ones included
  const int64_t* num_queries = nullptr;  // [B] how many columns are real, the last ones; null: all
};

// Let a prompt attend to its keys, each token to those up to its own. Outputs of other columns are left alone.
void prefill(const Prompt& prompt, int num_threads);

// Add to the scores, [B, Hkv, S] zeros, the weights that a prompt's last columns give to its keys, or make a score the
// largest such weight. The prompt has no values and no output.
void score_window(const Prompt& prompt, bool by_peak, float* scores, int64_t num_slots, int num_threads);

// The keys that an index is built from: [B, Hkv, S, D], rows dense, with strides in elements between rows and heads.
struct Keys {
  Dtype dtype = Dtype::kFloat32;
  int batch = 0, num_kv_heads = 0, head_dim = 0;
  const void* keys = nullptr;
  int64_t batch_stride = 0, head_stride = 0;
  const int64_t* lengths = nullptr;  // [B, Hkv]
};

// Build the bounds of empty pages from all keys.
void build_pages(const Keys& keys, const Pages& pages, int num_threads);

// Let an empty index of low-bit keys take in all keys.
void build_lowbit(const Keys& keys, const LowBitKeys& index, int num_threads);

// Compute output = input @ weight^T for few rows.
void multiply(const Linear& linear, int num_threads);

}  // namespace rocketkv
