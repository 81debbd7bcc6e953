// One decode step of one layer: append -> score -> choose -> attend, in one parallel region.
//
// Where there are many (batch row, KV head)s, a thread draws one after the other and does all of its work in memory that
// stays in its cache; while it chooses, what the next one reads first is fetched. Where there are few, each is cut into
// score tasks and then into attend tasks, drawn in that order; whoever finishes a head's last score task chooses its
// tokens, and an attend task waits until its head is chosen. The wait is short and cannot deadlock: the tasks waited for
// were drawn earlier and are running. So any number of heads, be it 1 or 3, keeps any number of threads busy.
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "channels.h"
#include "cut.h"
#include "dot.h"
#include "int8.h"
#include "kernels.h"
#include "lowbit.h"
#include "pages.h"
#include "threads.h"

namespace rocketkv {
namespace {

constexpr int kTile = 32;           // tokens attended between two updates of the running softmax
constexpr int kRowsAhead = 32;      // of keys or values, between a prefetch and its use
constexpr int kRowsMeanwhile = 12;  // of the index, fetched in each pass over a head's scores
constexpr int kGroupsAhead = 4;     // of low-bit keys, between a prefetch and its use
constexpr int kTokensAhead = 16;    // in 8 bits, between a prefetch and its use
constexpr int kPieceTokens = 2048;  // tokens of an attend task at most
constexpr int kChunks = kWidth > 8 ? 2 : 1;  // of pages or channels handled at once: what the registers hold sums for
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What the tasks of one (row, KV head) share.
struct Head {
  int64_t index, row;       // b * Hkv + h, b
  int64_t length;           // tokens to choose from, the new one included
  bool selects;             // or else everything is attended
  int64_t page_size, num_units, num_chosen;  // units: pages, or tokens where each is scored
  float* logits;            // [G][unit_stride]
  int32_t* chosen;          // [num_chosen] places, ascending; unused where everything is attended
  float* pieces;            // [num_pieces][G][2 + padded D]: maximum, sum, weighted values
  std::atomic<int> scores_left, pieces_left;
  std::atomic<bool> is_ready;
};

// Memory that a thread keeps from step to step.
template <class T>
struct Scratch {
  std::vector<float> floats, sums, weights;
  std::vector<int32_t> places;
  std::vector<T> restored;       // rows stored in 8 bits: keys and values of a tile, or one of each
  std::vector<Factor<T>> query;  // [G][padded D] of one head
  Channels<T> channels[2];       // of the present head and of the next
  Ahead<T> ahead;

  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

template <class T>
class Step {
 public:
  Step(const Layer& layer, const Token& token, int num_threads)
      : layer_(layer),
        token_(token),
        num_threads_(num_threads),
        num_heads_(static_cast<int64_t>(layer.batch) * layer.num_kv_heads),
        group_(layer.num_heads / layer.num_kv_heads),
        padded_(round_up(layer.head_dim, kPair)) {}

  int64_t run() {
    plan();
    auto work = [](void* data) {
      Step& step = *static_cast<Step*>(data);
      step.is_shared_ ? step.work_on_parts() : step.work_on_heads();
    };
    run_on_threads(num_threads_, work, this);
    for (int64_t i = 0; i < num_heads_; ++i) ++layer_.lengths[i];
    if (layer_.archive_lengths) for (int64_t i = 0; i < num_heads_; ++i) ++layer_.archive_lengths[i];
    for (int b = 0; b < layer_.batch; ++b) ++layer_.seen[b];
    return bytes_read_;
  }

 private:
  // ---- dividing the work

  void plan() {
    static thread_local std::vector<Head> heads;
    if (heads.size() != static_cast<size_t>(num_heads_)) heads = std::vector<Head>(num_heads_);
    heads_ = heads.data();
    int64_t most_units = 0, most_chosen = 0;
    for (int64_t i = 0; i < num_heads_; ++i) {
      Head& head = heads_[i];
      head.index = i;
      head.row = i / layer_.num_kv_heads;
      head.length = layer_.lengths[i] + 1;
      head.selects = layer_.scoring != Scoring::kDense && head.length > layer_.dense_lengths[head.row];
      const bool has_pages = layer_.scoring == Scoring::kPages || layer_.scoring == Scoring::kBounds;
      head.page_size = head.selects && has_pages ? layer_.pages.page_size[head.row] : 1;
      head.num_units = head.selects ? (head.length + head.page_size - 1) / head.page_size : 0;
      head.num_chosen = head.selects ? layer_.top_k[head.row] : head.length;
      most_units = std::max(most_units, head.num_units);
      most_chosen = std::max(most_chosen, head.num_chosen);
    }
    // Enough tasks to share out evenly, but none so small that sharing costs more than it saves.
    int64_t wanted = (4 * num_threads_ + num_heads_ - 1) / num_heads_;
    is_shared_ = num_threads_ > 1 && num_heads_ < 4 * num_threads_;
    num_score_tasks_ = is_shared_ ? std::clamp<int64_t>(most_units / (4 * kBlockPages), 1, wanted) : 1;
    num_pieces_ = is_shared_ ? std::clamp<int64_t>(most_chosen / kTile, 1, wanted) : 1;
    num_pieces_ = std::max(num_pieces_, (most_chosen + kPieceTokens - 1) / kPieceTokens);

    unit_stride_ = round_up(static_cast<int>(most_units), kGroup);
    num_floats_ = group_ * unit_stride_ + num_pieces_ * group_ * (2 + padded_);
    num_places_ = most_units > 0 ? most_chosen + kWidth : 0;  // what write_places may write
    if (!is_shared_) return;
    Scratch<T>& mine = Scratch<T>::mine();  // of this thread, for all of them
    mine.floats.resize(num_heads_ * num_floats_);
    mine.places.resize(num_heads_ * num_places_);
    for (int64_t i = 0; i < num_heads_; ++i) {
      Head& head = heads_[i];
      give_memory(head, mine.floats.data() + i * num_floats_, mine.places.data() + i * num_places_);
      head.scores_left.store(static_cast<int>(num_score_tasks_), std::memory_order_relaxed);
      head.pieces_left.store(static_cast<int>(num_pieces_), std::memory_order_relaxed);
      head.is_ready.store(false, std::memory_order_relaxed);
    }
  }

  void give_memory(Head& head, float* floats, int32_t* places) const {
    head.logits = floats;
    head.pieces = floats + group_ * unit_stride_;
    head.chosen = places;
  }

  int64_t next_task() { return next_task_.fetch_add(1, std::memory_order_relaxed); }

  void work_on_heads() {
    Scratch<T>& mine = Scratch<T>::mine();
    mine.floats.resize(num_floats_);
    mine.places.resize(num_places_);
    auto begin = [&](int64_t task, Channels<T>& channels) {
      Head& head = heads_[task];
      give_memory(head, mine.floats.data(), mine.places.data());
      if (!head.selects || !find_channels(head, channels)) return;
      if (layer_.scoring == Scoring::kLowBit) {
        mine.ahead.begin_lowbit(layer_, head.index, channels, head.length - 1);
      } else {
        mine.ahead.begin_pages(layer_, head.index, channels, (head.num_units - 1) / kBlockPages);
      }
    };
    Channels<T>*channels = mine.channels, *next_channels = mine.channels + 1;
    int64_t task = next_task();
    if (task < num_heads_) begin(task, *channels);
    while (task < num_heads_) {
      Head& head = heads_[task];
      mine.ahead.fetch_all();
      append(head);
      extend_spread(head);
      if (head.selects) score(head, 0, *channels);
      task = next_task();
      std::swap(channels, next_channels);
      if (task < num_heads_) begin(task, *channels);
      if (head.selects) choose(head, mine.ahead);
      if (token_.chosen) report(head);
      for (int64_t piece = 0; piece < num_pieces_; ++piece) attend(head, piece);
      merge(head);
    }
  }

  void work_on_parts() {
    Scratch<T>& mine = Scratch<T>::mine();
    int64_t score_tasks = num_heads_ * num_score_tasks_, tasks = score_tasks + num_heads_ * num_pieces_;
    for (int64_t task; (task = next_task()) < tasks;) {
      if (task < score_tasks) {
        Head& head = heads_[task / num_score_tasks_];
        int64_t part = task % num_score_tasks_;
        if (part == num_score_tasks_ - 1) append(head);  // before the part that scores the new token
        if (head.selects) find_channels(head, *mine.channels);
        if (head.selects) score(head, part, *mine.channels);
        if (head.scores_left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
          extend_spread(head);
          if (head.selects) choose(head, mine.ahead);
          if (token_.chosen) report(head);
          head.is_ready.store(true, std::memory_order_release);
        }
      } else {
        task -= score_tasks;
        Head& head = heads_[task / num_pieces_];
        for (int tries = 0; !head.is_ready.load(std::memory_order_acquire); ++tries)
          if (tries > 1000) std::this_thread::yield();
        attend(head, task % num_pieces_);
        if (head.pieces_left.fetch_sub(1, std::memory_order_acq_rel) == 1) merge(head);
      }
    }
  }

  // ---- append

  void append(const Head& head) {
    int64_t place = head.length - 1;
    int64_t slot = layer_.archived ? layer_.archive_lengths[head.index] : place;
    const T *key = new_row(token_.key, head), *value = new_row(token_.value, head);
    if (layer_.exponents) {
      const Codes codes = codes_of(head);
      quantize_row(key, layer_.head_dim, codes.key(slot), codes.key_exponents(slot));
      quantize_row(value, layer_.head_dim, codes.value(slot), codes.value_exponents(slot));
      T* restored = tile_memory();
      restore_row(codes.key(slot), codes.key_exponents(slot), layer_.head_dim, restored);
      key = restored;
    } else {
      std::memcpy(stored(layer_.keys, head, slot), key, layer_.head_dim * sizeof(T));
      std::memcpy(stored(layer_.values, head, slot), value, layer_.head_dim * sizeof(T));
    }
    layer_.positions[head.index * layer_.position_capacity + place] = static_cast<int32_t>(layer_.seen[head.row]);
    if (layer_.pages.bounds) fold_token(layer_.pages, head.index, layer_.pages.page_size[head.row], place, key, layer_.head_dim);
    if (layer_.lowbit.codes) append_key(layer_.lowbit, layer_.head_dim, head.index, place, key);
  }

  // Once all of a head's tasks have their channels: they are chosen by the spread from before the new token.
  void extend_spread(const Head& head) {
    const Pages& pages = layer_.pages;
    if (layer_.lowbit.codes) rocketkv::extend_spread<T>(layer_.lowbit, layer_.head_dim, head.index, head.length);
    if (pages.bounds && pages.spread)
      rocketkv::extend_spread<T>(pages, head.index, pages.page_size[head.row], head.length, layer_.head_dim);
  }

  // ---- score

  // The spread by which a head's channels are chosen; null if there is none.
  const float* spread_of(const Head& head) const {
    const float* spread = layer_.scoring == Scoring::kLowBit ? layer_.lowbit.spread : layer_.pages.spread;
    return spread ? spread + head.index * layer_.head_dim : nullptr;
  }

  // Which rows of the index are read; false if none are.
  bool find_channels(const Head& head, Channels<T>& channels) {
    if (layer_.scoring == Scoring::kPages || layer_.scoring == Scoring::kLowBit)
      channels.choose_largest(layer_, head.row, query_of(head), spread_of(head));
    if (layer_.scoring == Scoring::kBounds) channels.take_all(layer_, query_of(head));
    return layer_.scoring != Scoring::kExact;
  }

  void score(Head& head, int64_t part, const Channels<T>& channels) {
    const int unit_block = layer_.scoring == Scoring::kLowBit ? kGroup : kBlockPages;
    int64_t num_blocks = (head.num_units + unit_block - 1) / unit_block;
    int64_t begin = num_blocks * part / num_score_tasks_, end = num_blocks * (part + 1) / num_score_tasks_;
    if (part == 0 && spread_of(head)) bytes_read_ += layer_.head_dim * sizeof(float);
    if (begin == end) return;
    int64_t num_units = std::min(end * unit_block, head.num_units) - begin * unit_block;
    switch (layer_.scoring) {
      case Scoring::kExact: return score_exactly(head, begin * unit_block, num_units);
      case Scoring::kLowBit: return score_groups(head, channels, begin, end);
      default: return score_blocks(head, channels, begin, end, num_units);
    }
  }

  void score_blocks(Head& head, const Channels<T>& channels, int64_t begin, int64_t end, int64_t num_units) {
    for (int64_t block = begin; is_shared_ && block < std::min(begin + kBlocksAhead, end); ++block) {
      const T* bounds = page_bounds<T>(layer_.pages, head.index, block * kBlockPages);
      for (int place : channels.places) prefetch(bounds + place, kBlockPages * sizeof(T));
    }
    auto score_chunks = [&](auto chunks, int64_t page) {
      for (int h = 0; h < group_; h += kMaxHeads)
        with_heads(group_ - h, [&](auto heads) {
          score_pages<heads, chunks>(head, channels, h, page, h == 0 ? end : 0);
        });
    };
    int64_t page = begin * kBlockPages;
    for (; page + kChunks * kPair <= end * kBlockPages; page += kChunks * kPair)
      score_chunks(std::integral_constant<int, kChunks>(), page);
    for (; page < end * kBlockPages; page += kPair) score_chunks(std::integral_constant<int, 1>(), page);
    bytes_read_ += num_units * channels.count() * sizeof(T);
  }

  // logits[h][page] = scale[h] * sum over rows of weight[h][row] * bounds[row][page], for H heads from `first` on and
  // C chunks of pages. What is to be read kBlocksAhead further on is fetched, up to the block `fetch_end`.
  template <int H, int C>
  void score_pages(Head& head, const Channels<T>& channels, int first, int64_t page, int64_t fetch_end) {
    const int num_rows = channels.count(), stride = channels.stride();
    const int* places = channels.places.data();
    const Factor<T>* weights = channels.weights.data() + first * stride;
    const T* bounds[C];
    for (int k = 0; k < C; ++k) bounds[k] = page_bounds<T>(layer_.pages, head.index, page + k * kPair);
    const int64_t ahead = static_cast<int64_t>(kBlocksAhead) * layer_.pages.num_rows * kBlockPages;
    const bool fetches = page / kBlockPages + kBlocksAhead < fetch_end;
    Pair sums[C][H];
#pragma GCC unroll 2
    for (int k = 0; k < C; ++k)
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) sums[k][h] = {Vec{}, Vec{}};
    auto add = [&](const TwoChunks<T>& bound, int r, int k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) bound.add_weighted(weights + h * stride + r, sums[k][h]);
    };
    int r = 0;
    for (; r + 1 < num_rows; r += 2) {
      const int a = places[r], b = places[r + 1];
#pragma GCC unroll 2
      for (int k = 0; k < C; ++k) {
        if (fetches) prefetch(bounds[k] + ahead + a), prefetch(bounds[k] + ahead + b);
        add({bounds[k] + a, bounds[k] + b}, r, k);
      }
    }
    if (r < num_rows)
      for (int k = 0; k < C; ++k) {
        if (fetches) prefetch(bounds[k] + ahead + places[r]);
        add(TwoChunks<T>(bounds[k] + places[r]), r, k);
      }
    for (int k = 0; k < C; ++k)
      for (int h = 0; h < H; ++h) {
        Pair ordered = TwoChunks<T>::sums_in_order(sums[k][h]);
        float* out = head.logits + (first + h) * unit_stride_ + page + k * kPair;
        store(out, ordered.a * channels.scales[first + h]);
        store(out + kWidth, ordered.b * channels.scales[first + h]);
      }
  }

  void score_exactly(Head& head, int64_t begin, int64_t count) {
    bytes_read_ += count * layer_.head_dim * sizeof(T);
    const Factor<T>* query = query_factors(head);
    for (int64_t start = begin; start < begin + count; start += kTile) {
      const T* rows[kTile + 2 * kAhead];
      int n = static_cast<int>(std::min<int64_t>(kTile, begin + count - start));
      for (int i = 0; i < n + 2 * kAhead; ++i)
        rows[i] = stored(layer_.keys, head, slot_at(head, std::min(start + i, begin + count - 1)));
      for (int h = 0; h < group_; h += kMaxHeads)
        with_heads(group_ - h, [&](auto heads) {
          for (int i = 0; i < n; i += rows_at_once(heads)) {
            float out[kSums];
            dot_rows<heads, true>(rows + i, query + h * padded_, padded_, layer_.head_dim, out);
            for (int k = 0; k < heads; ++k)
              for (int j = 0; j < rows_at_once(heads) && i + j < n; ++j)
                head.logits[(h + k) * unit_stride_ + start + i + j] = out[k * rows_at_once(heads) + j] * layer_.scale;
          }
        });
    }
  }

  // The groups [begin, end) of low-bit keys, the last of which may be open.
  void score_groups(Head& head, const Channels<T>& channels, int64_t begin, int64_t end) {
    const int64_t whole = head.length / kGroup, num_open = end > whole ? head.length % kGroup : 0;
    const int64_t group_bytes = channels.count() * (kHalfGroup + 2 * sizeof(T));
    end = std::min(end, whole);
    bytes_read_ += std::max<int64_t>(end - begin, 0) * group_bytes + num_open * channels.count() * sizeof(T);
    for (int h = 0; h < group_; h += kMaxHeads)
      with_heads(group_ - h, [&](auto heads) {
        for (int64_t group = begin; group < end;) {
          int64_t stop = std::min(end, (group / kBlockGroups + 1) * kBlockGroups);
          score_whole_groups<heads>(head, channels, h, group, stop, h == 0 && stop < end);
          group = stop;
        }
        if (num_open > 0) score_open_group<heads>(head, channels, h, whole);
      });
  }

  // Groups of one block. A key is low + step * code, so that each channel adds q * low to all of a group's logits, and
  // the weights of its codes are q * step. If another block follows, what is read first of it is fetched. Ranges of other
  // groups than these may be undefined, or be written by the thread that appends: what comes of them is not used.
  template <int H>
  void score_whole_groups(Head& head, const Channels<T>& channels, int first, int64_t begin, int64_t end, bool fetches) {
    const int num_rows = channels.count(), stride = channels.stride(), dim = layer_.head_dim;
    const int64_t block = begin / kBlockGroups;
    const T* ranges = block_ranges<T>(layer_.lowbit, dim, head.index, block);
    std::vector<float>& weights = Scratch<T>::mine().weights;  // [pairs of rows][H], as TwoCodes wants them
    weights.resize((num_rows + 1) / 2 * H * TwoCodes<T>::kWeights);
    float offsets[H][kBlockGroups];
    for (int i = 0; i < kBlockGroups; i += kWidth) {
      Vec sums[H] = {};
      for (int r = 0; r < num_rows; r += 2) {
        Vec pair[H][2] = {};
        for (int j = 0; j < std::min(2, num_rows - r); ++j) {
          Pair range = load_ranges(ranges + (channels.places[r + j] * kBlockGroups + i) * 2);
          for (int h = 0; h < H; ++h) {
            float q = to_float(channels.weights[(first + h) * stride + r + j]);
            pair[h][j] = round_weights<T>(range.b * q);
            sums[h] += range.a * q - pair[h][j] * TwoCodes<T>::kOffset;
          }
        }
        for (int h = 0; h < H; ++h)
          TwoCodes<T>::store_weights(&weights[(r / 2 * H + h) * TwoCodes<T>::kWeights + i], pair[h][0], pair[h][1]);
      }
      for (int h = 0; h < H; ++h) store(&offsets[h][i], sums[h]);
    }
    const T* next_ranges = ranges + dim * kBlockGroups * 2;
    const uint8_t* next_codes = group_codes(layer_.lowbit, dim, head.index, (block + 1) * kBlockGroups);
    for (int64_t group = begin; group < end; ++group) {
      const uint8_t* codes = group_codes(layer_.lowbit, dim, head.index, group);
      const int in_block = static_cast<int>(group % kBlockGroups);
      // A cache line holds the codes of two groups; four groups on is another, of this block or of the next.
      const bool is_near = in_block + kGroupsAhead < kBlockGroups;
      const uint8_t* ahead = is_near ? codes + kGroupsAhead * kHalfGroup
                                     : next_codes + (in_block + kGroupsAhead - kBlockGroups) * kHalfGroup;
      const bool fetches_codes = in_block % 2 == 0 && (is_near || fetches);
      const bool fetches_ranges = in_block == kBlockGroups / 2 && fetches;
      for (int at = 0; at < kHalfGroup; at += kWidth * kChunks) {
        Pair sums[kChunks][H];
#pragma GCC unroll 2
        for (int k = 0; k < kChunks; ++k)
#pragma GCC unroll 4
          for (int h = 0; h < H; ++h) sums[k][h] = {Vec{}, Vec{}};
        for (int r = 0; r < num_rows; r += 2) {
          const int one = channels.places[r], other = channels.places[std::min(r + 1, num_rows - 1)];
          constexpr int codes_stride = kBlockGroups * kHalfGroup, ranges_stride = kBlockGroups * 2;
          if (at == 0 && fetches_codes) prefetch(ahead + one * codes_stride), prefetch(ahead + other * codes_stride);
          if (at == 0 && fetches_ranges) {
            prefetch(next_ranges + one * ranges_stride);
            prefetch(next_ranges + other * ranges_stride);
          }
          const float* weight = &weights[r / 2 * H * TwoCodes<T>::kWeights + in_block];
#pragma GCC unroll 2
          for (int k = 0; k < kChunks; ++k) {
            const uint8_t* from = codes + at + k * kWidth;
            const TwoCodes<T> two(from + one * codes_stride, from + other * codes_stride);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) two.add_weighted(weight + h * TwoCodes<T>::kWeights, sums[k][h]);
          }
        }
        for (int k = 0; k < kChunks; ++k)
          for (int h = 0; h < H; ++h) {
            float* out = head.logits + (first + h) * unit_stride_ + group * kGroup + at + k * kWidth;
            store(out, (sums[k][h].a + offsets[h][in_block]) * layer_.scale);
            store(out + kHalfGroup, (sums[k][h].b + offsets[h][in_block]) * layer_.scale);
          }
      }
    }
  }

  template <int H>
  void score_open_group(Head& head, const Channels<T>& channels, int first, int64_t group) {
    const T* keys = open_keys<T>(layer_.lowbit, layer_.head_dim, head.index);
    for (int at = 0; at < kGroup; at += kPair) {
      Pair sums[H] = {};
      int r = 0;
      for (; r + 1 < channels.count(); r += 2) {
        TwoChunks<T> chunks(keys + at + channels.places[r] * kGroup, keys + at + channels.places[r + 1] * kGroup);
        for (int h = 0; h < H; ++h) chunks.add_weighted(&channels.weights[(first + h) * channels.stride() + r], sums[h]);
      }
      if (r < channels.count()) {
        TwoChunks<T> chunk(keys + at + channels.places[r] * kGroup);
        for (int h = 0; h < H; ++h) chunk.add_weighted(&channels.weights[(first + h) * channels.stride() + r], sums[h]);
      }
      for (int h = 0; h < H; ++h) {
        Pair ordered = TwoChunks<T>::sums_in_order(sums[h]);
        float* out = head.logits + (first + h) * unit_stride_ + group * kGroup + at;
        store(out, ordered.a * layer_.scale);
        store(out + kWidth, ordered.b * layer_.scale);
      }
    }
  }

  // ---- choose

  // See score_tokens and choose_tokens in ops/scores.py. Meanwhile, what comes next is fetched.
  void choose(Head& head, Ahead<T>& ahead) {
    int64_t size = head.page_size;
    float* scores = head.logits;
    average_softmax(head, scores, ahead);
    int64_t sinks = std::min(layer_.sinks[head.row], head.length);
    int64_t open_end = head.length - std::min(layer_.recents[head.row], head.length - sinks);  // the pinned last ones follow
    int64_t wanted = head.num_chosen - sinks - (head.length - open_end);
    int64_t begin = sinks / size, end = wanted > 0 ? (open_end + size - 1) / size : begin;  // units with open tokens
    auto num_open = [&](int64_t unit) { return std::min((unit + 1) * size, open_end) - std::max(unit * size, sinks); };
    auto num_above = [&](uint32_t bound) {  // open tokens; the pinned ends cut into the first and the last unit
      int64_t tokens = count_above(scores + begin, end - begin, bound) * size;
      if (order_bits(scores[begin]) > bound) tokens -= sinks - begin * size;
      if (order_bits(scores[end - 1]) > bound) tokens -= end * size - open_end;
      return tokens;
    };
    int32_t* out = head.chosen;
    for (int64_t place = 0; place < sinks; ++place) *out++ = static_cast<int32_t>(place);
    if (wanted > 0) {
      uint32_t cut = find_cut(wanted, [&](uint32_t bound) {
        ahead.fetch(kRowsMeanwhile);
        return num_above(bound);
      });
      int64_t at_cut = wanted - num_above(cut);  // so many tokens of the units equal to the cut are taken
      if (size == 1) {
        out = write_places(cut, at_cut, scores, begin, end, out);
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
    for (int64_t place = open_end; place < head.length; ++place) *out++ = static_cast<int32_t>(place);
  }

  // scores[unit] = mean over heads of the softmax over tokens, each of which has its unit's logit. A unit whose logit is no
  // number has the best score, NaN, and the others keep their order: so it is chosen, and shows in the output.
  void average_softmax(const Head& head, float* scores, Ahead<T>& ahead) {
    int64_t num_units = head.num_units, end = (num_units + kWidth - 1) / kWidth * kWidth;
    float in_last = static_cast<float>(head.length - (num_units - 1) * head.page_size);
    for (int g = 0; g < group_; ++g) {
      float* logits = head.logits + g * unit_stride_;
      ahead.fetch(kRowsMeanwhile);
      for (int64_t i = num_units; i < end; ++i) logits[i] = -kInfinity;
      Vec best = broadcast(-kInfinity), sum = {};
      for (int64_t i = 0; i < end; i += kWidth) best = max(load<Vec>(logits + i), best);  // no NaN
      Vec top = broadcast(max_lane(best));
      for (int64_t i = 0; i < end; i += kWidth) {
        Vec e = exp_of_negative(load<Vec>(logits + i) - top);
        store(logits + i, e);
        sum += e;
      }
      float size = static_cast<float>(head.page_size);
      float total = sum_lane(sum) * size - (size - in_last) * logits[num_units - 1];
      if (total != total) total = 1.0f;
      Vec share = broadcast(1.0f / (total * static_cast<float>(group_)));
      for (int64_t i = 0; i < end; i += kWidth) {
        Vec score = load<Vec>(logits + i) * share;
        if (g > 0) score += load<Vec>(scores + i);
        store(scores + i, abs(score));
      }
    }
  }

  void report(const Head& head) {
    int32_t* out = token_.chosen + head.index * layer_.position_capacity;
    for (int64_t i = 0; i < head.num_chosen; ++i) out[i] = head.selects ? head.chosen[i] : static_cast<int32_t>(i);
    if (head.num_chosen < layer_.position_capacity) out[head.num_chosen] = -1;
  }

  // ---- attend

  void attend(Head& head, int64_t part) {
    int64_t begin = head.num_chosen * part / num_pieces_, end = head.num_chosen * (part + 1) / num_pieces_;
    float* piece = head.pieces + part * group_ * (2 + padded_);
    for (int g = 0; g < group_; ++g) {
      float* state = piece + g * (2 + padded_);
      std::fill(state, state + 2 + padded_, 0.0f);
      state[0] = -kInfinity;
    }
    if (begin == end) return;  // fewer tokens than pieces
    const Factor<T>* query = query_factors(head);
    const bool is_int8 = layer_.exponents;
    const T *keys = is_int8 ? tile_memory() : stored(layer_.keys, head, 0);
    const T* values = is_int8 ? keys + kTile * layer_.head_dim : stored(layer_.values, head, 0);
    int64_t rows[2 * kTile];  // where those of a tile and of the next begin; of 8 bits, their slots
    auto locate = [&](int64_t from, int64_t* out) {
      for (int i = 0; i < kTile; ++i) {
        int64_t place = std::min(from + i, end - 1);
        out[i] = slot_at(head, head.selects ? head.chosen[place] : place) * (is_int8 ? 1 : layer_.head_dim);
      }
    };
    locate(begin, rows + kTile);
    if (is_int8) {
      const Codes codes = codes_of(head);
      for (int i = kTile; i < kTile + kTokensAhead; ++i) codes.fetch(rows[i]);
    } else {
      for (int i = kTile; i < kTile + kRowsAhead; ++i) fetch(keys + rows[i], layer_.head_dim);
    }
    for (int64_t start = begin; start < end; start += kTile) {
      int n = static_cast<int>(std::min<int64_t>(kTile, end - start));
      std::copy_n(rows + kTile, kTile, rows);
      locate(start + kTile, rows + kTile);
      if (is_int8) restore_tile(codes_of(head), rows, n);
      for (int h = 0; h < group_; h += kMaxHeads)
        with_heads(group_ - h, [&](auto heads) {
          attend_tile<heads>(keys, values, rows, n, query + h * padded_, piece + h * (2 + padded_), h == 0 && !is_int8);
        });
    }
    bytes_read_ += (end - begin) * token_bytes();
  }

  // The codes of a head, by slot.
  Codes codes_of(const Head& head) const {
    const int dim = layer_.head_dim, steps = num_steps(dim);
    const int64_t slots = head.index * layer_.token_capacity;
    return {static_cast<int8_t*>(layer_.keys) + slots * dim, static_cast<int8_t*>(layer_.values) + slots * dim,
            layer_.exponents + slots * 2 * steps, dim, steps};
  }
  T* tile_memory() const {
    Scratch<T>::mine().restored.resize(2 * kTile * layer_.head_dim);
    return Scratch<T>::mine().restored.data();
  }

  // Restore the keys, then the values, of a tile's tokens into its memory, and let `rows` say where they are there. The
  // codes of the tokens kTokensAhead further on are fetched.
  void restore_tile(const Codes& codes, int64_t* rows, int n) const {
    T *keys = tile_memory(), *values = keys + kTile * codes.dim;
    for (int i = 0; i < n; ++i) {
      const int64_t slot = rows[i], ahead = i + kTokensAhead;
      codes.fetch(rows[ahead < n ? ahead : ahead + kTile - n]);
      rows[i] = static_cast<int64_t>(i) * codes.dim;
      restore_row(codes.key(slot), codes.key_exponents(slot), codes.dim, keys + rows[i]);
      restore_row(codes.value(slot), codes.value_exponents(slot), codes.dim, values + rows[i]);
    }
    for (int i = n; i < kTile; ++i) rows[i] = rows[n - 1];
  }

  static ROCKETKV_INLINE void fetch(const T* row, int count) { prefetch(row, count * static_cast<int>(sizeof(T))); }

  // Fetches the rows of a tile kRowsAhead before they are used, and after the last one those that are used next.
  struct Fetcher {
    const T* base;
    const int64_t* rows;
    int n, count;  // rows, channels of each
    const T* next_base;
    const int64_t* next_rows;
    int next_count;
    bool is_on;
    ROCKETKV_INLINE void fetch_for(int i) const {
      i += kRowsAhead;
      if (is_on) i < n ? fetch(base + rows[i], count) : fetch(next_base + next_rows[i - n], next_count);
    }
  };

  // A weight of values is the sum of so many factors: one that is rounded would show beside a rounded output.
  static constexpr int kTerms = std::is_same_v<Factor<T>, float> ? 1 : 2;

  template <int H>
  static ROCKETKV_INLINE Vec store_weights(Factor<T> (&weights)[kTerms][H][kTile], int h, int i, Vec rest) {
    Vec sum = {};
    for (int term = 0; term < kTerms; ++term) {
      Vec stored = store_factors(&weights[term][h][i], rest);
      rest -= stored;
      sum += stored;
    }
    return sum;
  }

  template <int H>
  void attend_tile(const T* keys, const T* values, const int64_t* rows, int n, const Factor<T>* query, float* piece,
                   bool fetches) {
    constexpr int N = rows_at_once(H);
    const int dim = layer_.head_dim;
    auto width_at = [&](int c) { return c + kChunks * kPair <= dim ? kChunks * kPair : std::min(kPair, dim - c); };
    float logits[H][kTile + N], corrections[H];
    Factor<T> weights[kTerms][H][kTile];
    const Fetcher fetcher{keys, rows, n, dim, values, rows, width_at(0), fetches};
    for (int i = 0; i < n; i += N) {
      const T* tile_rows[N];
      for (int j = 0; j < N; ++j) tile_rows[j] = keys + rows[i + j];
      for (int j = 0; j < N; ++j) fetcher.fetch_for(i + j);
      float products[kSums];
      dot_rows<H, false>(tile_rows, query, padded_, dim, products);
      for (int h = 0; h < H; ++h) std::memcpy(&logits[h][i], products + h * N, N * sizeof(float));
    }
    for (int h = 0; h < H; ++h) {
      float* state = piece + h * (2 + padded_);
      for (int i = n; i < round_up(n, kWidth); ++i) logits[h][i] = -kInfinity;
      Vec best = broadcast(state[0]), sum = {};
      for (int i = 0; i < n; i += kWidth) {
        Vec scaled = load<Vec>(&logits[h][i]) * layer_.scale;
        best = max(scaled, best);  // no NaN
        store(&logits[h][i], scaled);
      }
      const float top = max_lane(best), base = top == -kInfinity ? 0.0f : top;  // a tile that weighs nothing: no NaN
      for (int i = 0; i < n; i += kWidth)
        sum += store_weights<H>(weights, h, i, exp_of_negative(load<Vec>(&logits[h][i]) - base));  // of them as stored
      corrections[h] = std::exp(state[0] - base);
      state[0] = top;
      state[1] = state[1] * corrections[h] + sum_lane(sum);
    }
    for (int c = 0, width; c < dim; c += width) {
      width = width_at(c);
      const bool is_last = c + width == dim;
      const Fetcher fetcher{values + c, rows, n, width, is_last ? keys : values + c + width, is_last ? rows + kTile : rows,
                            is_last ? dim : width_at(c + width), fetches};
      if (width == kChunks * kPair) {
        add_values<H, kChunks>(fetcher, weights, corrections, piece + 2 + c);
      } else {
        add_values<H, 1>(fetcher, weights, corrections, piece + 2 + c);
      }
    }
  }

  // Add the weighted values of a tile, C chunks of channels, or a part of one.
  template <int H, int C>
  void add_values(const Fetcher& fetcher, const Factor<T> (&weights)[kTerms][H][kTile], const float* corrections,
                  float* piece) const {
    const int stride = 2 + padded_, n = fetcher.n, count = fetcher.count;
    const T* values = fetcher.base;
    const int64_t* rows = fetcher.rows;
    Pair sums[H][C];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 2
      for (int k = 0; k < C; ++k) {
        const float* state = piece + h * stride + k * kPair;
        sums[h][k] = {load<Vec>(state) * corrections[h], load<Vec>(state + kWidth) * corrections[h]};
      }
    auto add = [&](const TwoChunks<T>& value, int i, int k) __attribute__((always_inline)) {
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
        for (int k = 0; k < C; ++k) add(TwoChunks<T>(values + rows[i] + k * kPair), i, k);
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
        float* state = piece + h * stride + k * kPair;
        store(state, sums[h][k].a);
        store(state + kWidth, sums[h][k].b);
      }
  }

  void merge(const Head& head) {
    int64_t stride = 2 + padded_;
    T* output = static_cast<T*>(token_.output) + head.index * group_ * layer_.head_dim;
    std::vector<float>& sums = Scratch<T>::mine().sums;
    for (int g = 0; g < group_; ++g) {
      float top = -kInfinity, total = 0.0f;
      for (int64_t p = 0; p < num_pieces_; ++p) top = std::max(top, head.pieces[(p * group_ + g) * stride]);
      sums.assign(padded_, 0.0f);
      for (int64_t p = 0; p < num_pieces_; ++p) {
        const float* state = head.pieces + (p * group_ + g) * stride;
        float weight = std::exp(state[0] - top);
        total += weight * state[1];
        for (int c = 0; c < padded_; ++c) sums[c] += weight * state[2 + c];
      }
      for (int c = 0; c < padded_; c += kPair) {
        Pair pair = TwoChunks<T>::sums_in_order(load_pair(sums.data() + c));
        store(sums.data() + c, pair.a);
        store(sums.data() + c + kWidth, pair.b);
      }
      for (int c = 0; c < layer_.head_dim; ++c) output[g * layer_.head_dim + c] = from_float<T>(sums[c] / total);
    }
  }

  // ---- where things lie

  int64_t token_bytes() const {
    return 2 * (layer_.exponents ? layer_.head_dim + num_steps(layer_.head_dim) : layer_.head_dim * sizeof(T));
  }
  T* stored(void* tokens, const Head& head, int64_t slot) const {
    return static_cast<T*>(tokens) + (head.index * layer_.token_capacity + slot) * layer_.head_dim;
  }
  int64_t slot_at(const Head& head, int64_t place) const {
    return layer_.archived ? layer_.positions[head.index * layer_.position_capacity + place] : place;
  }
  const T* new_row(const void* rows, const Head& head) const {
    return static_cast<const T*>(rows) + head.index * layer_.head_dim;
  }

  const T* query_of(const Head& head) const {  // [G][D]
    return static_cast<const T*>(token_.query) + head.index * group_ * layer_.head_dim;
  }
  // The head's queries as factors, [G][padded D]; until this thread asks for the next head's.
  const Factor<T>* query_factors(const Head& head) const {
    std::vector<Factor<T>>& out = Scratch<T>::mine().query;
    out.resize(group_ * padded_);
    for (int g = 0; g < group_; ++g)
      prepare<T>(query_of(head) + g * layer_.head_dim, layer_.head_dim, out.data() + g * padded_);
    return out.data();
  }

  const Layer& layer_;
  const Token& token_;
  int num_threads_;
  int64_t num_heads_;  // rows times KV heads
  int group_, padded_;
  bool is_shared_;
  int64_t num_score_tasks_, num_pieces_;           // of a head
  int64_t unit_stride_, num_floats_, num_places_;  // of a head's memory
  Head* heads_;
  std::atomic<int64_t> next_task_{0}, bytes_read_{0};
};

}  // namespace

int64_t decode_step(const Layer& layer, const Token& token, int num_threads) {
  switch (layer.dtype) {
    case Dtype::kFloat32: return Step<float>(layer, token, num_threads).run();
    case Dtype::kBfloat16: return Step<Bfloat16>(layer, token, num_threads).run();
    default: return Step<Float16>(layer, token, num_threads).run();
  }
}

}  // namespace rocketkv
