// The kernels for Python. Tensors come as addresses: the caller has checked them and keeps them alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "kernels.h"
#include "memory.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using rocketkv::Dtype;
using rocketkv::Layer;
using rocketkv::Scoring;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void make_layer(Layer* self, Dtype dtype, int batch, int num_kv_heads, int num_heads, int head_dim, float scale,
                uintptr_t keys, uintptr_t values, uintptr_t exponents, int64_t token_capacity, uintptr_t positions,
                int64_t position_capacity, bool archived, uintptr_t lengths, uintptr_t archive_lengths, uintptr_t seen, Scoring scoring,
                uintptr_t bounds, int num_rows, uintptr_t codes, uintptr_t ranges, uintptr_t open_keys, uintptr_t spread, int64_t num_blocks,
                uintptr_t page_size, uintptr_t num_channels,
                uintptr_t top_k, uintptr_t sinks, uintptr_t recents, uintptr_t dense_lengths) {
  new (self) Layer{dtype, batch, num_kv_heads, num_heads, head_dim, scale,
                   at<void>(keys), at<void>(values), at<int8_t>(exponents), token_capacity, at<int32_t>(positions),
                   position_capacity, archived, at<int64_t>(lengths), at<int64_t>(archive_lengths), at<int64_t>(seen), scoring,
                   {at<void>(bounds), at<const int64_t>(page_size), num_blocks, num_rows, at<float>(spread)},
                   {at<uint8_t>(codes), at<void>(ranges), at<void>(open_keys), num_blocks, at<float>(spread)},
                   at<const int64_t>(num_channels), at<const int64_t>(top_k), at<const int64_t>(sinks),
                   at<const int64_t>(recents), at<const int64_t>(dense_lengths)};
}

}  // namespace

#define ROCKETKV_MODULE(name, module) NB_MODULE(name, module)  // expands the name first

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
  nb::class_<Layer>(m, "Layer")
      .def("__init__", &make_layer, nb::kw_only(), "dtype"_a, "batch"_a, "num_kv_heads"_a, "num_heads"_a, "head_dim"_a,
           "scale"_a, "keys"_a, "values"_a, "exponents"_a, "token_capacity"_a, "positions"_a, "position_capacity"_a, "archived"_a,
           "lengths"_a, "archive_lengths"_a, "seen"_a, "scoring"_a, "bounds"_a, "num_rows"_a,
           "codes"_a, "ranges"_a, "open_keys"_a, "spread"_a, "num_blocks"_a,
           "page_size"_a, "num_channels"_a, "top_k"_a, "sinks"_a, "recents"_a,
           "dense_lengths"_a)
      .def(
          "decode",
          [](const Layer& self, uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t output, uintptr_t chosen,
             int num_threads) {
            return rocketkv::decode_step(
                self, {at<void>(query), at<void>(key), at<void>(value), at<void>(output), at<int32_t>(chosen)}, num_threads);
          },
          nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "build_pages",
      [](Dtype dtype, int batch, int num_kv_heads, int head_dim, uintptr_t keys, int64_t batch_stride,
         int64_t head_stride, uintptr_t lengths, uintptr_t bounds, uintptr_t page_size, int64_t num_blocks, int num_rows,
         uintptr_t spread, int num_threads) {
        rocketkv::build_pages(
            {dtype, batch, num_kv_heads, head_dim, at<void>(keys), batch_stride, head_stride, at<int64_t>(lengths)},
            {at<void>(bounds), at<int64_t>(page_size), num_blocks, num_rows, at<float>(spread)}, num_threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "linear",
      [](Dtype dtype, uintptr_t weight, uintptr_t input, uintptr_t output, int64_t num_rows, int64_t num_in, int64_t num_out, int num_threads) {
        rocketkv::multiply({dtype, at<void>(weight), at<void>(input), at<void>(output), num_rows, num_in, num_out},
                           num_threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def("use_huge_pages", [](uintptr_t begin, size_t num_bytes) { rocketkv::use_huge_pages(at<void>(begin), num_bytes); });
  m.def("thread_runtime", &rocketkv::thread_runtime);
  m.attr("PAGES_PER_BLOCK") = rocketkv::kBlockPages;
  m.attr("GROUP") = rocketkv::kGroup;
  m.attr("GROUPS_PER_BLOCK") = rocketkv::kBlockGroups;
  m.attr("STEP_CHANNELS") = rocketkv::kStepChannels;
}
