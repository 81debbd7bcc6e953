// The Python module of the kernels. Tensors come as addresses; the caller has checked the tensors and keeps them alive.
//
// Python sets each struct field by name, so that no address can be taken for another.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "kernels.h"
#include "memory.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace rocketkv;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A class whose fields Python reads and writes; Python sees a pointer as an int.
template <class Struct>
struct Fields : nb::class_<Struct> {
  Fields(nb::module_& m, const char* name) : nb::class_<Struct>(m, name) { this->def(nb::init<>()); }

  template <class T>
  Fields& field(const char* name, T Struct::* member) {
    this->def_rw(name, member);
    return *this;
  }
  template <class T>
  Fields& field(const char* name, T* Struct::* member) {
    this->def_prop_rw(
        name, [member](const Struct& self) { return reinterpret_cast<uintptr_t>(self.*member); },
        [member](Struct& self, uintptr_t address) { self.*member = at<T>(address); });
    return *this;
  }
};

}  // namespace

#define ROCKETKV_MODULE(name, module) NB_MODULE(name, module)  // this extra macro lets ROCKETKV_NAME expand first

ROCKETKV_MODULE(ROCKETKV_NAME, m) {
  nb::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::kFloat32)
      .value("bfloat16", Dtype::kBfloat16)
      .value("float16", Dtype::kFloat16);
  nb::enum_<Scoring>(m, "Scoring")
      .value("dense", Scoring::kDense)
      .value("pages", Scoring::kPages)
      .value("bounds", Scoring::kBounds)
      .value("exact", Scoring::kExact)
      .value("lowbit", Scoring::kLowBit);
  Fields<Pages>(m, "Pages")
      .field("bounds", &Pages::bounds)
      .field("page_size", &Pages::page_size)
      .field("num_blocks", &Pages::num_blocks)
      .field("num_rows", &Pages::num_rows)
      .field("spread", &Pages::spread);
  Fields<LowBitKeys>(m, "LowBitKeys")
      .field("codes", &LowBitKeys::codes)
      .field("ranges", &LowBitKeys::ranges)
      .field("open_keys", &LowBitKeys::open_keys)
      .field("num_blocks", &LowBitKeys::num_blocks)
      .field("spread", &LowBitKeys::spread);
  Fields<Keys>(m, "Keys")
      .field("dtype", &Keys::dtype)
      .field("batch", &Keys::batch)
      .field("num_kv_heads", &Keys::num_kv_heads)
      .field("head_dim", &Keys::head_dim)
      .field("keys", &Keys::keys)
      .field("batch_stride", &Keys::batch_stride)
      .field("head_stride", &Keys::head_stride)
      .field("lengths", &Keys::lengths);
  Fields<LogitTerms>(m, "LogitTerms")
      .field("sink_logits", &LogitTerms::sink_logits)
      .field("softcap", &LogitTerms::softcap);
  Fields<Rows>(m, "Rows")
      .field("data", &Rows::data)
      .field("batch_stride", &Rows::batch_stride)
      .field("head_stride", &Rows::head_stride)
      .field("token_stride", &Rows::token_stride);
  Fields<Prompt>(m, "Prompt")
      .field("dtype", &Prompt::dtype)
      .field("batch", &Prompt::batch)
      .field("num_kv_heads", &Prompt::num_kv_heads)
      .field("num_heads", &Prompt::num_heads)
      .field("head_dim", &Prompt::head_dim)
      .field("num_tokens", &Prompt::num_tokens)
      .field("scale", &Prompt::scale)
      .field("terms", &Prompt::terms)
      .field("query", &Prompt::query)
      .field("output", &Prompt::output)
      .field("keys", &Prompt::keys)
      .field("values", &Prompt::values)
      .field("lengths", &Prompt::lengths)
      .field("num_queries", &Prompt::num_queries);
  Fields<Layer>(m, "Layer")
      .field("dtype", &Layer::dtype)
      .field("batch", &Layer::batch)
      .field("num_kv_heads", &Layer::num_kv_heads)
      .field("num_heads", &Layer::num_heads)
      .field("head_dim", &Layer::head_dim)
      .field("scale", &Layer::scale)
      .field("terms", &Layer::terms)
      .field("keys", &Layer::keys)
      .field("values", &Layer::values)
      .field("exponents", &Layer::exponents)
      .field("token_capacity", &Layer::token_capacity)
      .field("positions", &Layer::positions)
      .field("position_capacity", &Layer::position_capacity)
      .field("archived", &Layer::archived)
      .field("lengths", &Layer::lengths)
      .field("archive_lengths", &Layer::archive_lengths)
      .field("seen", &Layer::seen)
      .field("scoring", &Layer::scoring)
      .field("pages", &Layer::pages)
      .field("lowbit", &Layer::lowbit)
      .field("num_channels", &Layer::num_channels)
      .field("top_k", &Layer::top_k)
      .field("sinks", &Layer::sinks)
      .field("recents", &Layer::recents)
      .field("dense_lengths", &Layer::dense_lengths)
      .def(
          "decode",
          [](const Layer& self, uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t output, uintptr_t chosen,
             int num_threads) {
            Token token;
            token.query = at<void>(query);
            token.key = at<void>(key);
            token.value = at<void>(value);
            token.output = at<void>(output);
            token.chosen = at<int32_t>(chosen);
            return decode_step(self, token, num_threads);
          },
          nb::kw_only(), "query"_a, "key"_a, "value"_a, "output"_a, "chosen"_a, "num_threads"_a,
          nb::call_guard<nb::gil_scoped_release>());
  m.def("prefill", &prefill, "prompt"_a, "num_threads"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "score_window",
      [](const Prompt& prompt, bool by_peak, uintptr_t scores, int64_t num_slots, int num_threads) {
        score_window(prompt, by_peak, at<float>(scores), num_slots, num_threads);
      },
      "prompt"_a, nb::kw_only(), "by_peak"_a, "scores"_a, "num_slots"_a, "num_threads"_a,
      nb::call_guard<nb::gil_scoped_release>());
  m.def("build_lowbit", &build_lowbit, "keys"_a, "index"_a, "num_threads"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("build_pages", &build_pages, "keys"_a, "pages"_a, "num_threads"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "linear",
      [](Dtype dtype, uintptr_t weight, uintptr_t input, uintptr_t output, int64_t num_rows, int64_t num_in,
         int64_t num_out, int num_threads) {
        Linear linear;
        linear.dtype = dtype;
        linear.weight = at<void>(weight);
        linear.input = at<void>(input);
        linear.output = at<void>(output);
        linear.num_rows = num_rows;
        linear.num_in = num_in;
        linear.num_out = num_out;
        multiply(linear, num_threads);
      },
      nb::kw_only(), "dtype"_a, "weight"_a, "input"_a, "output"_a, "num_rows"_a, "num_in"_a, "num_out"_a,
      "num_threads"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "use_huge_pages", [](uintptr_t begin, size_t num_bytes) { use_huge_pages(at<void>(begin), num_bytes); },
      "begin"_a, "num_bytes"_a);
  m.def("thread_runtime", &thread_runtime);
  m.attr("PAGES_PER_BLOCK") = kPagesPerBlock;
  m.attr("GROUP") = kGroup;
  m.attr("GROUPS_PER_BLOCK") = kGroupsPerBlock;
  m.attr("LEVELS") = kLevels;
  m.attr("STEP_CHANNELS") = kStepChannels;
  m.attr("NOT_FINITE") = kNotFinite;
}
