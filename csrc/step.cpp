// One decode step of one layer: append -> score -> choose -> attend, in one parallel region.
//
// Where there are many (batch row, KV head)s, a thread draws one after the other and does all of its work in memory that
// stays in its cache. Where there are few, each is cut into score tasks and then into attend tasks, drawn in that order;
// whoever finishes a head's last score task chooses its tokens, and an attend task waits until its head is chosen. The
// wait is short and cannot deadlock: the tasks waited for were drawn earlier and are running. So any number of heads, be
// it 1 or 3, keeps any number of threads busy.
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "cut.h"
#include "dot.h"
#include "kernels.h"
#include "pages.h"
#include "threads.h"

namespace rocketkv {
namespace {

constexpr int kTile = 64;           // tokens attended between two updates of the running softmax
constexpr int kPieceTokens = 2048;  // tokens of an attend task at most
constexpr int kBlocksAhead = 2;     // of pages, between a prefetch and its use
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

// Which rows of the index a step reads, and what each adds to the logits of the heads.
template <class T>
struct Channels {
  std::vector<int> rows;
  std::vector<Factor<T>> weights;  // [G][rows, and one more if they are odd in number]
  std::vector<float> scales;       // [G] factors on the sums
  int stride() const { return round_up(static_cast<int>(rows.size()), 2); }
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
    return elements_read_;
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
      head.selects = layer_.scoring != Scoring::kNone && head.length > layer_.dense_lengths[head.row];
      head.page_size = layer_.scoring == Scoring::kExact || !head.selects ? 1 : layer_.pages.page_size[head.row];
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

    unit_stride_ = round_up(static_cast<int>(most_units), kBlockPages);
    num_floats_ = group_ * unit_stride_ + num_pieces_ * group_ * (2 + padded_);
    num_places_ = most_units > 0 ? most_chosen : 0;
    if (!is_shared_) return;
    static thread_local std::vector<float> floats;
    static thread_local std::vector<int32_t> places;
    floats.resize(num_heads_ * num_floats_);
    places.resize(num_heads_ * num_places_);
    for (int64_t i = 0; i < num_heads_; ++i) {
      Head& head = heads_[i];
      give_memory(head, floats.data() + i * num_floats_, places.data() + i * num_places_);
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
    static thread_local std::vector<float> floats;
    static thread_local std::vector<int32_t> places;
    floats.resize(num_floats_);
    places.resize(num_places_);
    for (int64_t task; (task = next_task()) < num_heads_;) {
      Head& head = heads_[task];
      give_memory(head, floats.data(), places.data());
      append(head);
      if (head.selects) score(head, 0);
      if (head.selects) choose(head);
      if (token_.chosen) report(head);
      for (int64_t piece = 0; piece < num_pieces_; ++piece) attend(head, piece);
      merge(head);
    }
  }

  void work_on_parts() {
    int64_t score_tasks = num_heads_ * num_score_tasks_, tasks = score_tasks + num_heads_ * num_pieces_;
    for (int64_t task; (task = next_task()) < tasks;) {
      if (task < score_tasks) {
        Head& head = heads_[task / num_score_tasks_];
        int64_t part = task % num_score_tasks_;
        if (part == num_score_tasks_ - 1) append(head);  // before the part that scores the new token
        if (head.selects) score(head, part);
        if (head.scores_left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
          if (head.selects) choose(head);
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
    size_t row_bytes = layer_.head_dim * sizeof(T);
    const T* key = new_row(token_.key, head);
    std::memcpy(stored(layer_.keys, head, slot), key, row_bytes);
    std::memcpy(stored(layer_.values, head, slot), new_row(token_.value, head), row_bytes);
    layer_.positions[head.index * layer_.position_capacity + place] = static_cast<int32_t>(layer_.seen[head.row]);
    if (layer_.pages.bounds) fold_token(layer_.pages, head.index, layer_.pages.page_size[head.row], place, key, layer_.head_dim);
  }

  // ---- score

  void score(Head& head, int64_t part) {
    int64_t num_blocks = (head.num_units + kBlockPages - 1) / kBlockPages;
    int64_t begin = num_blocks * part / num_score_tasks_, end = num_blocks * (part + 1) / num_score_tasks_;
    if (begin == end) return;
    int64_t num_units = std::min(end * kBlockPages, head.num_units) - begin * kBlockPages;
    if (layer_.scoring == Scoring::kExact) {
      score_exactly(head, begin * kBlockPages, num_units);
      elements_read_ += num_units * layer_.head_dim;
      return;
    }
    static thread_local Channels<T> channels;
    if (layer_.scoring == Scoring::kHybrid) {
      choose_channels(head, channels);
    } else {
      all_channels(head, channels);
    }
    for (int64_t block = begin; block < std::min(begin + kBlocksAhead, end); ++block) {
      const T* bounds = page_bounds<T>(layer_.pages, head.index, block * kBlockPages);
      for (int row : channels.rows) prefetch(bounds + row * kBlockPages, kBlockPages * sizeof(T));
    }
    for (int64_t block = begin; block < end; ++block)
      for (int h = 0; h < group_; h += kMaxHeads)
        with_heads(group_ - h, [&](auto heads) {
          score_block<heads>(head, channels, h, block, h == 0 && block + kBlocksAhead < end);
        });
    elements_read_ += num_units * static_cast<int64_t>(channels.rows.size());
  }

  // RocketKV, section "Hybrid Sparse Attention", step 1; see hybrid_logits in ops/pages.py.
  void choose_channels(const Head& head, Channels<T>& out) {
    int head_dim = layer_.head_dim, count = static_cast<int>(layer_.num_channels[head.row]);
    bool has_minima = layer_.pages.num_rows > head_dim;
    static thread_local std::vector<float> query, sizes, sums;  // with whole pairs of channels, zeros beyond head_dim
    query.resize(group_ * padded_);
    sizes.assign(padded_, 0.0f);
    sums.assign(padded_, 0.0f);
    for (int g = 0; g < group_; ++g)
      for (int c = 0; c < padded_; c += kPair) {
        Part<T> part(query_of(head) + g * head_dim + c, std::min(kPair, head_dim - c));
        Pair pair = in_order<T>(load_pair(part.numbers));
        for (int half = 0; half < 2; ++half) {
          Vec q = half == 0 ? pair.a : pair.b;
          int at = c + half * kWidth;
          store(query.data() + g * padded_ + at, q);
          store(sizes.data() + at, load<Vec>(sizes.data() + at) + abs(q));
          store(sums.data() + at, load<Vec>(sums.data() + at) + q);
        }
      }
    auto num_above = [&](uint32_t bound) { return count_above(sizes.data(), head_dim, bound); };
    uint32_t cut = find_cut([&](uint32_t bound) { return num_above(bound) >= count; });
    int64_t at_cut = count - num_above(cut);  // so many of those equal to the cut are taken
    out.rows.clear();
    for_each_from(cut, sizes.data(), 0, head_dim, [&](int64_t c) {
      if (order_bits(sizes[c]) > cut || at_cut-- > 0) out.rows.push_back(static_cast<int>(c));
    });
    out.weights.assign(group_ * out.stride(), from_float<Factor<T>>(0.0f));
    out.scales.resize(group_);
    for (int g = 0; g < group_; ++g) {
      const float* q = query.data() + g * padded_;
      Vec all = {};
      for (int c = 0; c < padded_; c += kWidth) all += abs(load<Vec>(q + c));
      float chosen = 0.0f;
      for (size_t r = 0; r < out.rows.size(); ++r) {
        chosen += std::fabs(q[out.rows[r]]);
        out.weights[g * out.stride() + r] = from_float<Factor<T>>(q[out.rows[r]]);
      }
      float share = chosen / std::max(sum_lane(all), 1e-30f);  // SparQ's temperature
      out.scales[g] = layer_.scale / std::max(std::sqrt(share), 1e-15f);
    }
    if (has_minima)  // the maxima follow them
      for (int& row : out.rows) row += sums[row] > 0 ? head_dim : 0;
  }

  // Quest, section "Dynamically Estimating Token Criticality"; see bound_logits in ops/pages.py.
  void all_channels(const Head& head, Channels<T>& out) {
    int head_dim = layer_.head_dim, num_rows = layer_.pages.num_rows;
    out.rows.resize(num_rows);
    out.weights.assign(group_ * out.stride(), from_float<Factor<T>>(0.0f));
    out.scales.assign(group_, layer_.scale);
    for (int r = 0; r < num_rows; ++r) {
      out.rows[r] = r;
      for (int g = 0; g < group_; ++g) {
        float q = to_float(query_of(head)[g * head_dim + r % head_dim]);
        bool is_read = num_rows == head_dim || (r < head_dim ? q < 0 : q > 0);  // minima if negative, maxima if positive
        out.weights[g * out.stride() + r] = from_float<Factor<T>>(is_read ? q : 0.0f);
      }
    }
  }

  // logits[h][page] = scale[h] * sum over rows of weight[h][row] * bounds[row][page], for H heads from `first` on.
  template <int H>
  void score_block(Head& head, const Channels<T>& channels, int first, int64_t block, bool fetches) {
    const T* bounds = page_bounds<T>(layer_.pages, head.index, block * kBlockPages);
    const int64_t ahead = static_cast<int64_t>(kBlocksAhead) * layer_.pages.num_rows * kBlockPages;
    const int num_rows = static_cast<int>(channels.rows.size()), stride = channels.stride();
    const int* rows = channels.rows.data();
    const Factor<T>* weights = channels.weights.data() + first * stride;
    for (int lane = 0; lane < kBlockPages; lane += kPair) {
      Pair sums[H];
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) sums[h] = {Vec{}, Vec{}};
      auto add = [&](const TwoChunks<T>& bound, int r) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) bound.add_weighted(weights + h * stride + r, sums[h]);
      };
      int r = 0;
      for (; r + 1 < num_rows; r += 2) {
        const T *a = bounds + rows[r] * kBlockPages + lane, *b = bounds + rows[r + 1] * kBlockPages + lane;
        if (fetches) prefetch(a + ahead), prefetch(b + ahead);
        add({a, b}, r);
      }
      if (r < num_rows) {
        const T* a = bounds + rows[r] * kBlockPages + lane;
        if (fetches) prefetch(a + ahead);
        add(TwoChunks<T>(a), r);
      }
      for (int h = 0; h < H; ++h) {
        Pair ordered = in_order<T>(sums[h]);
        float* out = head.logits + (first + h) * unit_stride_ + block * kBlockPages + lane;
        store(out, ordered.a * channels.scales[first + h]);
        store(out + kWidth, ordered.b * channels.scales[first + h]);
      }
    }
  }

  void score_exactly(Head& head, int64_t begin, int64_t count) {
    const Factor<T>* query = query_factors(head);
    for (int64_t start = begin; start < begin + count; start += kTile) {
      const T* rows[kTile + 2 * kAhead];
      int n = static_cast<int>(std::min<int64_t>(kTile, begin + count - start));
      for (int i = 0; i < n + 2 * kAhead; ++i) rows[i] = stored(layer_.keys, head, slot_at(head, start + std::min(i, n - 1)));
      for (int h = 0; h < group_; h += kMaxHeads)
        with_heads(group_ - h, [&](auto heads) {
          for (int i = 0; i < n; i += rows_at_once(heads)) {
            float out[8];
            dot_rows<heads, true>(rows + i, query + h * padded_, padded_, layer_.head_dim, out);
            for (int j = 0; j < rows_at_once(heads) && i + j < n; ++j)
              for (int k = 0; k < heads; ++k) head.logits[(h + k) * unit_stride_ + start + i + j] = out[j * heads + k] * layer_.scale;
          }
        });
    }
  }

  // ---- choose

  // See score_tokens and choose_tokens in ops/scores.py.
  void choose(Head& head) {
    int64_t size = head.page_size;
    float* scores = head.logits;
    average_softmax(head, scores);
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
      uint32_t cut = find_cut([&](uint32_t bound) { return num_above(bound) >= wanted; });
      int64_t at_cut = wanted - num_above(cut);  // so many tokens of the units equal to the cut are taken
      for_each_from(cut, scores, begin, end, [&](int64_t unit) {
        int64_t count = num_open(unit), first = std::max(unit * size, sinks);
        if (order_bits(scores[unit]) == cut) {
          count = std::min(count, at_cut);
          at_cut -= count;
        }
        for (int64_t i = 0; i < count; ++i) *out++ = static_cast<int32_t>(first + i);
      });
    }
    for (int64_t place = open_end; place < head.length; ++place) *out++ = static_cast<int32_t>(place);
  }

  // scores[unit] = mean over heads of the softmax over tokens, each of which has its unit's logit.
  void average_softmax(const Head& head, float* scores) {
    int64_t num_units = head.num_units, end = (num_units + kWidth - 1) / kWidth * kWidth;
    float in_last = static_cast<float>(head.length - (num_units - 1) * head.page_size);
    for (int g = 0; g < group_; ++g) {
      float* logits = head.logits + g * unit_stride_;
      for (int64_t i = num_units; i < end; ++i) logits[i] = -kInfinity;
      Vec best = broadcast(-kInfinity), sum = {};
      for (int64_t i = 0; i < end; i += kWidth) best = max(best, load<Vec>(logits + i));
      Vec top = broadcast(max_lane(best));
      for (int64_t i = 0; i < end; i += kWidth) {
        Vec e = exp_of_negative(load<Vec>(logits + i) - top);
        store(logits + i, e);
        sum += e;
      }
      float size = static_cast<float>(head.page_size);
      float total = sum_lane(sum) * size - (size - in_last) * logits[num_units - 1];
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
    const Factor<T>* query = query_factors(head);
    bool is_scattered = head.selects || layer_.archived;  // then the hardware cannot foresee what is read next
    const T *keys[2 * kTile], *values[2 * kTile];  // of a tile and of the next
    auto locate = [&](int64_t from, int at) {
      for (int i = at; i < at + kTile; ++i, ++from) {
        int64_t place = std::min(from, end - 1);
        int64_t slot = is_scattered ? slot_at(head, head.selects ? head.chosen[place] : place) : place;
        keys[i] = stored(layer_.keys, head, slot);
        values[i] = stored(layer_.values, head, slot);
      }
    };
    locate(begin, kTile);
    for (int i = kTile; i < 2 * kTile; ++i) fetch(keys[i], 0, layer_.head_dim), fetch(values[i], 0, layer_.head_dim);
    for (int64_t start = begin; start < end; start += kTile) {
      int n = static_cast<int>(std::min<int64_t>(kTile, end - start));
      std::copy_n(keys + kTile, kTile, keys);
      std::copy_n(values + kTile, kTile, values);
      locate(start + kTile, kTile);
      for (int h = 0; h < group_; h += kMaxHeads)
        with_heads(group_ - h, [&](auto heads) {
          attend_tile<heads>(keys, values, n, query + h * padded_, piece + h * (2 + padded_), h == 0);
        });
    }
    elements_read_ += 2 * (end - begin) * layer_.head_dim;
  }

  static void fetch(const T* row, int first, int count) { prefetch(row + first, count * static_cast<int>(sizeof(T))); }

  // While this tile is worked on, the next one is fetched at the pace of the work: keys with keys, values with values.
  template <int H>
  void attend_tile(const T* const* keys, const T* const* values, int n, const Factor<T>* query, float* piece, bool fetches) {
    constexpr int N = rows_at_once(H);
    const int dim = layer_.head_dim, padded = padded_;
    float logits[H][kTile + kAhead], corrections[H];
    Factor<T> weights[H][kTile];
    for (int i = 0; i < n; i += N) {
      for (int j = i; fetches && j < i + N; ++j) fetch(keys[kTile + j], 0, dim);
      float products[8];
      dot_rows<H, false>(keys + i, query, padded, dim, products);
      for (int j = 0; j < N; ++j)
        for (int h = 0; h < H; ++h) logits[h][i + j] = products[j * H + h];
    }
    for (int h = 0; h < H; ++h) {
      float* state = piece + h * (2 + padded);
      for (int i = n; i < round_up(n, kWidth); ++i) logits[h][i] = -kInfinity;
      Vec best = broadcast(state[0]), sum = {};
      for (int i = 0; i < n; i += kWidth) {
        Vec scaled = load<Vec>(&logits[h][i]) * layer_.scale;
        best = max(best, scaled);
        store(&logits[h][i], scaled);
      }
      float top = max_lane(best);
      for (int i = 0; i < n; i += kWidth) sum += store_factors(&weights[h][i], exp_of_negative(load<Vec>(&logits[h][i]) - top));
      corrections[h] = std::exp(state[0] - top);
      state[0] = top;
      state[1] = state[1] * corrections[h] + sum_lane(sum);
    }
    for (int c = 0; c < dim; c += kPair) {
      const int count = std::min(kPair, dim - c);
      Pair sums[H];
      for (int h = 0; h < H; ++h) {
        const float* state = piece + h * (2 + padded) + 2 + c;
        sums[h] = {load<Vec>(state) * corrections[h], load<Vec>(state + kWidth) * corrections[h]};
      }
      auto add = [&](const TwoChunks<T>& value, int i) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) value.add_weighted(&weights[h][i], sums[h]);
      };
      int i = 0;
      if (count == kPair) {
        for (; i + 1 < n; i += 2) {
          if (fetches) fetch(values[kTile + i], c, kPair), fetch(values[kTile + i + 1], c, kPair);
          add({values[i] + c, values[i + 1] + c}, i);
        }
        if (i < n) add(TwoChunks<T>(values[i] + c), i);
      } else {
        for (; i < n; i += 2) {
          Part<T> a(values[i] + c, count), b(values[i + 1] + c, i + 1 < n ? count : 0);
          add({a.numbers, b.numbers}, i);
        }
      }
      for (int h = 0; h < H; ++h) {
        float* state = piece + h * (2 + padded) + 2 + c;
        store(state, sums[h].a);
        store(state + kWidth, sums[h].b);
      }
    }
  }

  void merge(const Head& head) {
    int64_t stride = 2 + padded_;
    T* output = static_cast<T*>(token_.output) + head.index * group_ * layer_.head_dim;
    static thread_local std::vector<float> sums;
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
        Pair pair = in_order<T>(load_pair(sums.data() + c));
        store(sums.data() + c, pair.a);
        store(sums.data() + c + kWidth, pair.b);
      }
      for (int c = 0; c < layer_.head_dim; ++c) output[g * layer_.head_dim + c] = from_float<T>(sums[c] / total);
    }
  }

  // ---- where things lie

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
    static thread_local std::vector<Factor<T>> out;
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
  std::atomic<int64_t> next_task_{0}, elements_read_{0};
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
