// One decode step of one layer: append -> score -> choose -> attend, in one parallel region.
//
// A task is one KV head of one batch row. Where there are many tasks, a thread draws one after the other and does all
// of its work in memory that stays in its cache; while the thread chooses, what its next task reads first is fetched.
// Where there are few, each task is cut into parts to score and pieces to attend to, and threads draw all parts before
// the pieces. Whoever finishes a task's last part chooses its tokens, and whoever draws a piece waits until its task's
// tokens are chosen. The wait is short and cannot deadlock: the parts waited for were drawn earlier and are running, or
// a thread has failed, and then nobody waits. So any number of tasks, be it 1 or 3, keeps any number of threads busy.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "attend.h"
#include "choose.h"
#include "restore.h"
#include "score_exact.h"
#include "score_lowbit.h"
#include "score_pages.h"
#include "threads.h"
#include "view.h"

namespace rocketkv {
namespace {

constexpr int kPieceTokens = 2048;  // tokens of a piece at most

// Call f with the functions of a scoring other than kDense. Each scoring is a header with a class of these:
//   kUnitsPerBlock  how many units, pages or tokens, are scored together
//   page_size       tokens of a row's unit
//   spread          the numbers by which channels are chosen, or null
//   append          let the index take in the new token
//   extend_spread   let the spread take in the new token
//   prepare         find what is read of the index
//   fetch_first     tell the prefetcher what is read first
//   score           write the logits of some blocks of units, and return the bytes read
template <class T, class F>
auto with_scoring(Scoring scoring, F f) {
  switch (scoring) {
    case Scoring::kExact: return f(ExactScoring<T>());
    case Scoring::kLowBit: return f(LowBitScoring<T>());
    case Scoring::kBounds: return f(BoundScoring<T>());
    default: return f(PageScoring<T>());
  }
}

template <class T>
class Step {
 public:
  Step(const Layer& layer, const Token& token, int num_threads) : view_(layer, token), num_threads_(num_threads) {}

  int64_t run() {
    plan();
    auto work = [](void* data) {
      Step& step = *static_cast<Step*>(data);
      try {
        step.view_.is_shared ? step.work_on_parts() : step.work_on_tasks();
      } catch (...) {
        step.has_failed_ = true;
        throw;
      }
    };
    run_on_threads(num_threads_, work, this);
    if (!appends()) return bytes_read_;
    const Layer& layer = view_.layer;
    for (int64_t i = 0; i < view_.num_tasks; ++i) ++layer.lengths[i];
    if (layer.archive_lengths)
      for (int64_t i = 0; i < view_.num_tasks; ++i) ++layer.archive_lengths[i];
    for (int b = 0; b < layer.batch; ++b) ++layer.seen[b];
    return bytes_read_;
  }

 private:
  // ---- dividing the work

  void plan() {
    static thread_local std::vector<HeadTask> tasks;
    const Layer& layer = view_.layer;
    const int64_t num_tasks = view_.num_tasks;
    if (tasks.size() != static_cast<size_t>(num_tasks)) tasks = std::vector<HeadTask>(num_tasks);
    tasks_ = tasks.data();
    int64_t most_units = 0, most_chosen = 0;
    for (int64_t i = 0; i < num_tasks; ++i) {
      HeadTask& task = tasks_[i];
      task.index = i;
      task.row = i / layer.num_kv_heads;
      task.length = layer.lengths[i] + appends();
      task.selects = layer.scoring != Scoring::kDense && task.length > layer.dense_lengths[task.row];
      task.page_size = 1;
      if (task.selects)
        with_scoring<T>(layer.scoring, [&](auto scoring) { task.page_size = scoring.page_size(layer, task.row); });
      task.num_units = task.selects ? (task.length + task.page_size - 1) / task.page_size : 0;
      task.num_chosen = task.selects ? layer.top_k[task.row] : task.length;
      most_units = std::max(most_units, task.num_units);
      most_chosen = std::max(most_chosen, task.num_chosen);
    }
    // Enough parts to share out evenly, but none so small that sharing costs more than it saves.
    int64_t wanted = (4 * num_threads_ + num_tasks - 1) / num_tasks, num_pieces = 1;
    view_.is_shared = num_threads_ > 1 && num_tasks < 4 * num_threads_;
    if (view_.is_shared) {
      view_.num_score_parts = std::clamp<int64_t>(most_units / (4 * kPagesPerBlock), 1, wanted);
      num_pieces = std::clamp<int64_t>(most_chosen / kTile, 1, wanted);
    }
    view_.num_pieces = std::max(num_pieces, (most_chosen + kPieceTokens - 1) / kPieceTokens);

    view_.unit_stride = round_up(static_cast<int>(most_units), kGroup);
    num_floats_ = view_.group * view_.unit_stride + view_.num_pieces * view_.group * (2 + view_.padded);
    num_ranks_ = most_units > 0 ? most_chosen + kWidth : 0;  // write_indices may write so many
    if (!view_.is_shared) return;
    Scratch<T>& mine = Scratch<T>::mine();  // this thread's memory, for all of them
    mine.floats.resize(num_tasks * num_floats_);
    mine.ranks.resize(num_tasks * num_ranks_);
    for (int64_t i = 0; i < num_tasks; ++i) {
      HeadTask& task = tasks_[i];
      give_memory(task, mine.floats.data() + i * num_floats_, mine.ranks.data() + i * num_ranks_);
      task.scores_left.store(static_cast<int>(view_.num_score_parts), std::memory_order_relaxed);
      task.pieces_left.store(static_cast<int>(view_.num_pieces), std::memory_order_relaxed);
      task.is_ready.store(false, std::memory_order_relaxed);
    }
  }

  void give_memory(HeadTask& task, float* floats, int32_t* ranks) const {
    task.logits = floats;
    task.pieces = floats + view_.group * view_.unit_stride;
    task.chosen = ranks;
  }

  int64_t draw() { return next_.fetch_add(1, std::memory_order_relaxed); }

  // A thread does all of one task's work, then draws another.
  void work_on_tasks() {
    Scratch<T>& mine = Scratch<T>::mine();
    mine.floats.resize(num_floats_);
    mine.ranks.resize(num_ranks_);
    auto begin = [&](int64_t index, QueryChannels<T>& channels) {
      HeadTask& task = tasks_[index];
      give_memory(task, mine.floats.data(), mine.ranks.data());
      if (!task.selects) return;
      with_scoring<T>(view_.layer.scoring, [&](auto scoring) {
        scoring.prepare(view_, task, channels);
        mine.prefetcher.clear();
        scoring.fetch_first(view_, task, channels, mine.prefetcher);
      });
    };
    QueryChannels<T>*channels = mine.channels, *next_channels = mine.channels + 1;
    int64_t index = draw();
    if (index < view_.num_tasks) begin(index, *channels);
    while (index < view_.num_tasks) {
      HeadTask& task = tasks_[index];
      mine.prefetcher.fetch_all();
      append(task);
      extend_spread(task);
      if (task.selects) score(task, 0, *channels);
      index = draw();
      std::swap(channels, next_channels);
      if (index < view_.num_tasks) begin(index, *channels);
      if (task.selects) choose(view_, task, mine.prefetcher);
      if (view_.token.chosen) report(task);
      for (int64_t piece = 0; piece < view_.num_pieces; ++piece) attend(task, piece);
      merge(task);
    }
  }

  // A thread does one part of a task's scoring or attention, then draws another.
  void work_on_parts() {
    Scratch<T>& mine = Scratch<T>::mine();
    const int64_t num_score_parts = view_.num_score_parts, num_pieces = view_.num_pieces;
    const int64_t score_parts = view_.num_tasks * num_score_parts, parts = score_parts + view_.num_tasks * num_pieces;
    for (int64_t drawn; (drawn = draw()) < parts;) {
      if (drawn < score_parts) {
        HeadTask& task = tasks_[drawn / num_score_parts];
        const int64_t part = drawn % num_score_parts;
        if (part == num_score_parts - 1) append(task);  // before the part that scores the new token
        if (task.selects) {
          with_scoring<T>(view_.layer.scoring, [&](auto scoring) { scoring.prepare(view_, task, *mine.channels); });
          score(task, part, *mine.channels);
        }
        if (task.scores_left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
          extend_spread(task);
          if (task.selects) choose(view_, task, mine.prefetcher);
          if (view_.token.chosen) report(task);
          task.is_ready.store(true, std::memory_order_release);
        }
      } else {
        drawn -= score_parts;
        HeadTask& task = tasks_[drawn / num_pieces];
        for (int tries = 0; !task.is_ready.load(std::memory_order_acquire); ++tries) {
          if (has_failed_) return;
          if (tries > 1000) std::this_thread::yield();
        }
        attend(task, drawn % num_pieces);
        if (task.pieces_left.fetch_sub(1, std::memory_order_acq_rel) == 1) merge(task);
      }
    }
  }

  // ---- the phases of a task

  bool appends() const { return view_.token.key != nullptr; }

  void append(const HeadTask& task) {
    if (!appends()) return;
    const Layer& layer = view_.layer;
    const int64_t rank = task.length - 1;
    const int64_t slot = layer.archived ? layer.archive_lengths[task.index] : rank;
    const T *key = view_.new_row(view_.token.key, task), *value = view_.new_row(view_.token.value, task);
    if (layer.exponents) {
      const Codes codes = view_.codes_of(task);
      quantize_row(key, layer.head_dim, codes.key(slot), codes.key_exponents(slot));
      quantize_row(value, layer.head_dim, codes.value(slot), codes.value_exponents(slot));
      T* restored = view_.tile_memory();
      restore_row(codes.key(slot), codes.key_exponents(slot), layer.head_dim, restored);
      key = restored;
    } else {
      std::memcpy(view_.stored(layer.keys, task, slot), key, layer.head_dim * sizeof(T));
      std::memcpy(view_.stored(layer.values, task, slot), value, layer.head_dim * sizeof(T));
    }
    layer.positions[task.index * layer.position_capacity + rank] = static_cast<int32_t>(layer.seen[task.row]);
    if (layer.scoring != Scoring::kDense)
      with_scoring<T>(layer.scoring, [&](auto scoring) { scoring.append(layer, task, key); });
  }

  // A task's channels are chosen by the spread from before the new token, so that this comes after all of its scoring.
  void extend_spread(const HeadTask& task) {
    if (appends() && view_.layer.scoring != Scoring::kDense)
      with_scoring<T>(view_.layer.scoring, [&](auto scoring) { scoring.extend_spread(view_.layer, task); });
  }

  void score(HeadTask& task, int64_t part, const QueryChannels<T>& channels) {
    with_scoring<T>(view_.layer.scoring, [&](auto scoring) {
      constexpr int kUnits = scoring.kUnitsPerBlock;
      const int64_t num_blocks = (task.num_units + kUnits - 1) / kUnits, num_parts = view_.num_score_parts;
      const int64_t begin = num_blocks * part / num_parts, end = num_blocks * (part + 1) / num_parts;
      if (part == 0 && scoring.spread(view_.layer)) bytes_read_ += view_.layer.head_dim * sizeof(float);
      if (begin < end) bytes_read_ += scoring.score(view_, task, channels, begin, end);
    });
  }

  void report(const HeadTask& task) {
    const int64_t capacity = view_.layer.position_capacity;
    int32_t* out = view_.token.chosen + task.index * capacity;
    for (int64_t i = 0; i < task.num_chosen; ++i) out[i] = task.selects ? task.chosen[i] : static_cast<int32_t>(i);
    if (task.num_chosen < capacity) out[task.num_chosen] = -1;
  }

  void attend(HeadTask& task, int64_t piece) { bytes_read_ += Attention<T>::attend(view_, task, piece); }

  void merge(const HeadTask& task) { Attention<T>::merge(view_, task); }

  View<T> view_;
  int num_threads_;
  int64_t num_floats_, num_ranks_;  // of a task's memory
  HeadTask* tasks_;
  std::atomic<int64_t> next_{0}, bytes_read_{0};
  std::atomic<bool> has_failed_{false};  // a thread has thrown, for want of memory
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
