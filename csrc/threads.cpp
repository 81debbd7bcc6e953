#include "threads.h"

#include <dlfcn.h>
#if defined(__linux__)
#include <link.h>
#endif

#include <atomic>
#include <cstring>
#include <exception>

namespace rocketkv {
namespace {

// The entry that GCC compiles `#pragma omp parallel` to; LLVM's and Intel's runtimes have it too.
using Fork = void (*)(void (*)(void*), void*, unsigned num_threads, unsigned flags);

struct Runtime {
  Fork fork = nullptr;
  std::string name;
};

bool is_openmp(const char* path) {
  return std::strstr(path, "libgomp") || std::strstr(path, "libomp") || std::strstr(path, "libiomp");
}

#if defined(__linux__)
int look_at(dl_phdr_info* info, size_t, void* data) {
  auto& runtime = *static_cast<Runtime*>(data);
  if (!info->dlpi_name || !is_openmp(info->dlpi_name)) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return 0;
  if (auto fork = reinterpret_cast<Fork>(dlsym(library, "GOMP_parallel"))) runtime = {fork, info->dlpi_name};
  return runtime.fork && std::strstr(info->dlpi_name, "torch");  // another package may have brought its own
}
#endif

const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime runtime;
#if defined(__linux__)
    dl_iterate_phdr(look_at, &runtime);
#else
    runtime.fork = reinterpret_cast<Fork>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (runtime.fork) runtime.name = "libomp";
#endif
    return runtime;
  }();
  return found;
}

// A body whose exceptions stay inside: one that left a parallel region would end the process.
struct Guarded {
  void (*body)(void*);
  void* data;
  std::exception_ptr thrown = nullptr;  // what the first thread threw that threw anything
  std::atomic<bool> has_thrown{false};

  static void run(void* self) {
    auto& guarded = *static_cast<Guarded*>(self);
    try {
      guarded.body(guarded.data);
    } catch (...) {
      if (!guarded.has_thrown.exchange(true)) guarded.thrown = std::current_exception();
    }
  }
};

}  // namespace

void run_on_threads(int num_threads, void (*body)(void*), void* data) {
  if (num_threads <= 1 || !runtime().fork) return body(data);
  Guarded guarded{body, data};
  runtime().fork(Guarded::run, &guarded, num_threads, 0);
  if (guarded.thrown) std::rethrow_exception(guarded.thrown);
}

std::string thread_runtime() {
  const std::string& path = runtime().name;
  return path.substr(path.find_last_of('/') + 1);
}

}  // namespace rocketkv
