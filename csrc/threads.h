// This runs a function on the threads that torch already has, never on a second pool beside them.
#pragma once

#include <string>

namespace rocketkv {

// Call body(data) on `num_threads` threads at once, the caller's among them, and wait for all.
//
// The threads are those of the OpenMP runtime that this process has loaded (torch brings one), so they are the very
// threads that a matrix product before this call has left waiting. Without such a runtime the caller works alone. What
// a thread throws, such as std::bad_alloc, the caller throws once all threads are done; so no thread may wait for what
// another would have done.
void run_on_threads(int num_threads, void (*body)(void*), void* data);

// The file name of that runtime; empty if there is none.
std::string thread_runtime();

}  // namespace rocketkv
