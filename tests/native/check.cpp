// A check of the kernels without Python: prompts, products and decode steps beside plain loops (plain.h). For machines
// that have no Python at hand, as in an emulator; `make test-aarch64` runs it. Buffers are full of NaN before use.
#include <cstdlib>
#include <string>

#include "plain.h"

namespace {

using namespace rocketkv;
using plain::Row;

constexpr int kBatch = 2, kKvHeads = 2, kGroupSize = 3, kHeads = kKvHeads * kGroupSize, kDim = 80;
constexpr int kTasks = kBatch * kKvHeads;

int passed = 0, failed = 0;

void expect(bool holds, const std::string& what) {
  holds ? ++passed : ++failed;
  if (!holds) std::printf("FAILED %s\n", what.c_str());
}

template <class T>
const char* name() {
  return std::is_same_v<T, float> ? "float32" : std::is_same_v<T, Bfloat16> ? "bfloat16" : "float16";
}
template <class T>
constexpr Dtype kDtype = std::is_same_v<T, float>      ? Dtype::kFloat32
                         : std::is_same_v<T, Bfloat16> ? Dtype::kBfloat16
                                                       : Dtype::kFloat16;
// Rounding of an output of at most 1, and of the attention weights before it.
template <class T>
constexpr double kTolerance = std::is_same_v<T, float>      ? 1e-5
                              : std::is_same_v<T, Bfloat16> ? 1e-2
                                                            : 2e-3;

template <class T>
std::vector<T> not_a_number(size_t count) {
  return std::vector<T>(count, from_float<T>(std::numeric_limits<float>::quiet_NaN()));
}

// The largest difference; infinite if a number is none.
template <class T>
double distance(const T* found, const Row& wanted) {
  double most = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double difference = std::fabs(to_float(found[i]) - wanted[i]);
    most = difference >= 0 ? std::max(most, difference) : plain::kInfinity;
  }
  return most;
}

// ---- prompts: rows of different lengths, with padded columns

template <class T>
void check_prefill(int num_threads) {
  constexpr int kTokens = 70, kSlots = 150;
  const int64_t lengths[kTasks] = {130, 95, 150, 70}, num_queries[kBatch] = {70, 41};
  plain::Random random;
  std::vector<T> query = random.numbers<T>(kBatch * kHeads * kTokens * kDim);
  std::vector<T> keys = not_a_number<T>(kTasks * kSlots * kDim), values = keys, output = not_a_number<T>(query.size());
  for (int task = 0; task < kTasks; ++task)
    for (std::vector<T>* each : {&keys, &values}) {
      std::vector<T> rows = random.numbers<T>(lengths[task] * kDim);
      std::copy(rows.begin(), rows.end(), each->begin() + task * kSlots * kDim);
    }
  auto rows = [](std::vector<T>& from, int heads, int tokens) {
    return Rows{from.data(), int64_t{heads} * tokens * kDim, int64_t{tokens} * kDim, kDim};
  };
  Prompt prompt;
  prompt.dtype = kDtype<T>;
  prompt.batch = kBatch, prompt.num_kv_heads = kKvHeads, prompt.num_heads = kHeads, prompt.head_dim = kDim;
  prompt.num_tokens = kTokens;
  prompt.scale = 0.3f;
  prompt.query = rows(query, kHeads, kTokens), prompt.output = rows(output, kHeads, kTokens);
  prompt.keys = rows(keys, kKvHeads, kSlots), prompt.values = rows(values, kKvHeads, kSlots);
  prompt.lengths = lengths, prompt.num_queries = num_queries;
  prefill(prompt, num_threads);

  double most = 0;
  bool leaves_padding = true;
  for (int head = 0; head < kBatch * kHeads; ++head) {
    const int row = head / kHeads, task = head / kGroupSize;
    plain::Rows all_keys, all_values;
    for (int s = 0; s < lengths[task]; ++s) {
      all_keys.push_back(plain::to_row(&keys[(task * kSlots + s) * kDim], kDim));
      all_values.push_back(plain::to_row(&values[(task * kSlots + s) * kDim], kDim));
    }
    for (int t = 0; t < kTokens; ++t) {
      const T* found = &output[(head * kTokens + t) * kDim];
      if (t < kTokens - num_queries[row]) {
        leaves_padding &= std::isnan(to_float(found[0])) && std::isnan(to_float(found[kDim - 1]));
        continue;
      }
      std::vector<int> seen(lengths[task] - (kTokens - 1 - t));
      std::iota(seen.begin(), seen.end(), 0);
      const Row one = plain::to_row(&query[(head * kTokens + t) * kDim], kDim);
      most = std::max(most, distance(found, plain::attend(one, all_keys, all_values, seen, 0.3)));
    }
  }
  const std::string what = std::string("prefill in ") + name<T>() + ", threads " + std::to_string(num_threads);
  expect(most < kTolerance<T>, what + ": differs by " + std::to_string(most));
  expect(leaves_padding, what + ": padded columns are written");
}

// ---- products with a weight matrix

template <class T>
void check_linear() {
  plain::Random random;
  for (auto [num_rows, num_in, num_out] : {std::array{1, 96, 37}, std::array{5, 257, 64}, std::array{8, 20, 1}}) {
    std::vector<T> weight = random.numbers<T>(num_out * num_in), input = random.numbers<T>(num_rows * num_in);
    std::vector<T> output = not_a_number<T>(num_rows * num_out);
    multiply({kDtype<T>, weight.data(), input.data(), output.data(), num_rows, num_in, num_out}, 3);
    double most = 0;
    for (int m = 0; m < num_rows; ++m) {
      Row wanted;
      for (int o = 0; o < num_out; ++o)
        wanted.push_back(
            plain::dot(plain::to_row(&input[m * num_in], num_in), plain::to_row(&weight[o * num_in], num_in)));
      most = std::max(most, distance(&output[m * num_out], wanted));
    }
    expect(most < 10 * kTolerance<T>, std::string("linear in ") + name<T>() + ": differs by " + std::to_string(most));
  }
}

// ---- decode steps, from no token on, so that the steps build the whole index

template <class T>
class Decode {
 public:
  Decode(Scoring scoring, int page_size, bool is_int8, int num_threads)
      : num_threads_(num_threads),
        page_size_(page_size),
        keys_(kTasks),
        values_(kTasks),
        page_sizes_(kBatch, page_size) {
    layer_.dtype = kDtype<T>;
    layer_.batch = kBatch, layer_.num_kv_heads = kKvHeads, layer_.num_heads = kHeads, layer_.head_dim = kDim;
    layer_.scale = 0.5f;
    layer_.scoring = scoring;
    layer_.keys = stored_keys_.data(), layer_.values = stored_values_.data();
    if (is_int8) layer_.exponents = exponents_.data();
    layer_.token_capacity = layer_.position_capacity = kCapacity;
    layer_.positions = positions_.data(), layer_.lengths = lengths_.data(), layer_.seen = seen_.data();
    const int num_rows = page_size == 1 ? kDim : 2 * kDim;
    bounds_ = not_a_number<T>(kTasks * kBlocks * num_rows * kPagesPerBlock);
    layer_.pages = {bounds_.data(), page_sizes_.data(), kBlocks, num_rows, spread_.data()};
    layer_.lowbit = {codes_.data(), ranges_.data(), open_keys_.data(), 1, spread_.data()};
    layer_.num_channels = num_channels_.data(), layer_.top_k = top_k_.data();
    layer_.sinks = sinks_.data(), layer_.recents = recents_.data(), layer_.dense_lengths = dense_lengths_.data();
  }

  void run() {
    for (int step = 0; step < kSteps; ++step) decode();
    const std::string what = std::string("steps in ") + name<T>() + (layer_.exponents ? ", int8" : "") + ", scoring " +
                             std::to_string(static_cast<int>(layer_.scoring)) + ", pages of " +
                             std::to_string(page_size_) + ", threads " + std::to_string(num_threads_);
    expect(most_ < kTolerance<T>, what + ": outputs differ by " + std::to_string(most_));
    expect(has_pins_, what + ": the choice is not in order, or lacks pinned tokens");
    expect(missed_ < 1e-3, what + ": a token left out is better than a chosen one by " + std::to_string(missed_));
    if (layer_.scoring == Scoring::kPages && !layer_.exponents) check_built_pages(what);
  }

 private:
  static constexpr int kSteps = 200, kCapacity = 210, kBlocks = 7;
  static constexpr int kStepsOfRow = (kDim + kStepChannels - 1) / kStepChannels;

  void decode() {
    std::vector<T> query = random_.numbers<T>(kBatch * kHeads * kDim), output = not_a_number<T>(query.size());
    std::vector<T> key = random_.numbers<T>(kTasks * kDim), value = random_.numbers<T>(kTasks * kDim);
    std::vector<int32_t> chosen(kTasks * kCapacity);
    decode_step(layer_, {query.data(), key.data(), value.data(), output.data(), chosen.data()}, num_threads_);
    for (int task = 0; task < kTasks; ++task) {
      const int newest = static_cast<int>(keys_[task].size());
      keys_[task].push_back(stored(layer_.keys, task, newest, 0, &key[task * kDim]));
      values_[task].push_back(stored(layer_.values, task, newest, 1, &value[task * kDim]));
      std::vector<int> ranks;
      for (int i = 0; i < kCapacity && chosen[task * kCapacity + i] >= 0; ++i)
        ranks.push_back(chosen[task * kCapacity + i]);
      plain::Rows queries;
      for (int g = 0; g < kGroupSize; ++g) {
        const int head = task * kGroupSize + g;
        queries.push_back(plain::to_row(&query[head * kDim], kDim));
        const Row wanted = plain::attend(queries[g], keys_[task], values_[task], ranks, layer_.scale);
        most_ = std::max(most_, distance(&output[head * kDim], wanted));
      }
      check_choice(task / kKvHeads, ranks, queries, keys_[task]);
    }
  }

  // The row as the kernels stored it; codes are held to the row that they stand for.
  Row stored(const void* rows, int task, int slot, int which, const T* given) {
    if (!layer_.exponents) return plain::to_row(given, kDim);
    Row out(kDim);
    for (int c = 0; c < kDim; ++c) {
      const int64_t at = int64_t{task} * kCapacity + slot;
      const int exponent = exponents_[(at * 2 + which) * kStepsOfRow + c / kStepChannels];
      out[c] = std::ldexp(static_cast<const int8_t*>(rows)[at * kDim + c], exponent);
      most_ = std::max(most_, std::fabs(out[c] - to_float(given[c])) > std::ldexp(1.0, exponent) ? 1.0 : 0.0);
    }
    return out;
  }

  void check_choice(int row, const std::vector<int>& ranks, const plain::Rows& queries, const plain::Rows& keys) {
    const int length = static_cast<int>(keys.size());
    const bool is_dense = layer_.scoring == Scoring::kDense || length <= dense_lengths_[row];
    std::vector<bool> is_chosen(length);
    for (int rank : ranks) is_chosen[rank] = true;
    has_pins_ &= static_cast<int>(ranks.size()) == (is_dense ? length : top_k_[row]);
    has_pins_ &= std::is_sorted(ranks.begin(), ranks.end()) && is_chosen[0] && is_chosen[length - 1];
    if (is_dense) return;
    const Row scores = plain::scores(logits(queries, keys, static_cast<int>(num_channels_[row])));
    double least = 1.0, best = 0.0;
    for (int s = 0; s < length; ++s) {
      const bool is_pinned = s < sinks_[row] || s >= length - recents_[row];
      has_pins_ &= !is_pinned || is_chosen[s];
      if (is_pinned) continue;
      if (is_chosen[s]) least = std::min(least, scores[s]);
      if (!is_chosen[s]) best = std::max(best, scores[s]);
    }
    missed_ = std::max(missed_, (best - least) / least);  // rounding may exchange tokens that are as good
  }

  plain::Rows logits(const plain::Rows& queries, const plain::Rows& keys, int num_channels) const {
    const plain::Scorer scorer{queries, keys, layer_.scale, num_channels, page_size_};
    switch (layer_.scoring) {
      case Scoring::kExact: return scorer.exact();
      case Scoring::kBounds: return scorer.bounds();
      case Scoring::kLowBit: return scorer.template lowbit<T>();
      default: return scorer.pages();
    }
  }

  // The bounds that the steps have built equal those that are built at once.
  void check_built_pages(const std::string& what) {
    std::vector<T> bounds = not_a_number<T>(bounds_.size());
    std::vector<float> spread(spread_.size());
    const Keys keys{kDtype<T>,        kBatch,         kKvHeads, kDim, layer_.keys, kKvHeads * kCapacity * kDim,
                    kCapacity * kDim, lengths_.data()};
    build_pages(keys, {bounds.data(), page_sizes_.data(), kBlocks, layer_.pages.num_rows, spread.data()}, num_threads_);
    expect(std::memcmp(bounds.data(), bounds_.data(), bounds.size() * sizeof(T)) == 0, what + ": built bounds differ");
    expect(spread == spread_, what + ": the built spread differs");
  }

  plain::Random random_;
  int num_threads_, page_size_;
  std::vector<plain::Rows> keys_, values_;
  double most_ = 0, missed_ = 0;
  bool has_pins_ = true;

  Layer layer_;
  std::vector<T> stored_keys_ = not_a_number<T>(kTasks * kCapacity * kDim), stored_values_ = stored_keys_;
  std::vector<int8_t> exponents_ = std::vector<int8_t>(kTasks * kCapacity * 2 * kStepsOfRow, kNotFinite);
  std::vector<int32_t> positions_ = std::vector<int32_t>(kTasks * kCapacity, -1);
  std::vector<int64_t> lengths_ = std::vector<int64_t>(kTasks), seen_ = std::vector<int64_t>(kBatch), page_sizes_;
  std::vector<int64_t> num_channels_{30, 41}, top_k_{24, 40}, sinks_{2, 1}, recents_{3, 1}, dense_lengths_{40, 64};
  std::vector<T> bounds_;
  std::vector<float> spread_ = not_a_number<float>(kTasks * kDim);
  std::vector<uint8_t> codes_ = std::vector<uint8_t>(kTasks * kDim * kGroupsPerBlock * kGroup / 2, 0xff);
  std::vector<T> ranges_ = not_a_number<T>(kTasks * kDim * kGroupsPerBlock * 2);
  std::vector<T> open_keys_ = not_a_number<T>(kTasks * kDim * kGroup);
};

template <class T>
void check() {
  for (int num_threads : {1, 3}) check_prefill<T>(num_threads);
  check_linear<T>();
  for (Scoring scoring : {Scoring::kDense, Scoring::kPages, Scoring::kBounds, Scoring::kExact, Scoring::kLowBit})
    for (int page_size : {3, 1}) {
      const bool has_pages = scoring == Scoring::kPages || scoring == Scoring::kBounds;
      if (page_size > 1 && !has_pages) continue;
      for (int num_threads : {1, 3}) Decode<T>(scoring, page_size, false, num_threads).run();
      if (scoring != Scoring::kExact) Decode<T>(scoring, page_size, true, 1).run();
    }
}

}  // namespace

int main() {
  check<float>();
  check<rocketkv::Bfloat16>();
  check<rocketkv::Float16>();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
