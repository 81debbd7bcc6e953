// The fibers behind emulator.h. Blocks run one after the other in a shuffled order. Of a block's fibers any that can go
// on does: drawn at random, or the last that became ready, so that one warp runs ahead of the others as far as barriers
// let it. Kernels that depend on an order of threads that no barrier gives them come to grief.
#include "emulator.h"

#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <vector>

uint3 threadIdx, blockIdx, blockDim;
uint4* dynamic_shared;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 16;

struct Fiber {
  ucontext_t start;
  jmp_buf context;
  std::vector<char> stack;
  uint3 index;
  std::vector<char> argument;  // the thread's own
  bool is_new = true, has_waited;
};

// The lanes of a warp hand over numbers in turns; two turns' numbers are kept, since a lane may be one turn ahead.
struct Warp {
  unsigned numbers[2][kWarp];
  int turn = 0, arrived = 0, line = 0;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<int> ready;  // fibers that can go on
int current, num_threads, at_barrier, barrier_line, num_done;
jmp_buf scheduler, failed;
char failure[200];
void (*kernel)(const void*);
const char* argument;
int argument_bytes;
unsigned random_state = 1;

unsigned draw(unsigned below) {
  random_state ^= random_state << 13, random_state ^= random_state >> 17, random_state ^= random_state << 5;
  return random_state % below;
}

[[noreturn]] void fail(const char* what, int line, int other) {
  std::snprintf(failure, sizeof(failure), "%s (lines %d and %d of the source)", what, line, other);
  _longjmp(failed, 1);
}

__attribute__((noinline)) void pause() {
  if (_setjmp(fibers[current].context) == 0) _longjmp(scheduler, 1);
  threadIdx = fibers[current].index;
}

void run_fiber() {
  for (;;) {
    threadIdx = fibers[current].index;
    kernel(fibers[current].argument.data());
    if (!fibers[current].has_waited) fail("a thread ends that has not waited for the kernel before", 0, 0);
    ++num_done;
    pause();
  }
}

__attribute__((noinline)) void resume(int fiber) {
  current = fiber;
  if (_setjmp(scheduler) != 0) return;
  Fiber& next = fibers[fiber];
  if (!next.is_new) _longjmp(next.context, 1);
  next.is_new = false;
  getcontext(&next.start);
  next.stack.resize(kStack);
  next.start.uc_stack.ss_sp = next.stack.data();
  next.start.uc_stack.ss_size = kStack;
  makecontext(&next.start, run_fiber, 0);
  setcontext(&next.start);
}

void run_block() {
  num_done = at_barrier = 0;
  warps.assign(num_threads / kWarp, Warp());
  const bool is_random = draw(2), is_reversed = draw(2);
  for (int i = 0; i < num_threads; ++i) ready.push_back(is_reversed ? num_threads - 1 - i : i);
  while (!ready.empty()) {
    const unsigned place = is_random ? draw(ready.size()) : ready.size() - 1;
    const int fiber = ready[place];
    ready[place] = ready.back();
    ready.pop_back();
    resume(fiber);
  }
  if (num_done < num_threads) fail("threads wait for others that have ended or wait elsewhere", barrier_line, 0);
}

// Take part in a turn of the warp, and go on once all lanes have.
const unsigned* hand_over(unsigned number, int line) {
  const int first = current / kWarp * kWarp;
  Warp& warp = warps[current / kWarp];
  unsigned* numbers = warp.numbers[warp.turn % 2];
  if (warp.arrived > 0 && warp.line != line) fail("lanes of a warp are at different operations", warp.line, line);
  warp.line = line;
  numbers[current - first] = number;
  if (++warp.arrived < kWarp) {
    pause();
    return numbers;
  }
  warp.arrived = 0;
  ++warp.turn;
  for (int lane = first; lane < first + kWarp; ++lane)
    if (lane != current) ready.push_back(lane);
  return numbers;
}

}  // namespace

void wait_for_block(int line) {
  if (at_barrier > 0 && barrier_line != line) fail("threads of a block are at different barriers", barrier_line, line);
  barrier_line = line;
  if (++at_barrier < num_threads) return pause();
  at_barrier = 0;
  for (int i = 0; i < num_threads; ++i)
    if (i != current) ready.push_back(i);
}

unsigned exchange(unsigned number, int lane, int line) { return hand_over(number, line)[lane]; }

unsigned vote(bool is_for, int line) {
  const unsigned* votes = hand_over(is_for, line);
  unsigned all = 0;
  for (int lane = 0; lane < kWarp; ++lane) all |= votes[lane] << lane;
  return all;
}

void wait_for_previous() {
  fibers[current].has_waited = true;
  std::memcpy(fibers[current].argument.data(), argument, argument_bytes);
}

namespace {

struct Launch {
  unsigned grid[3], threads, dynamic_bytes, overlaps, seed;
};

// Run all blocks. Before each block, its memory is filled with what is no number.
void run_grid(const Launch& launch, std::vector<unsigned>& blocks, std::vector<uint4>& dynamic, char* shared,
              char* shared_end) {
  for (unsigned left = blocks.size(); left > 0; --left) {
    const unsigned place = draw(left), block = blocks[place];
    blocks[place] = blocks[left - 1];
    blockIdx = {block % launch.grid[0], block / launch.grid[0] % launch.grid[1], block / launch.grid[0] / launch.grid[1]};
    std::memset(shared, 0xff, shared_end - shared);
    std::memset(dynamic.data(), 0xff, dynamic.size() * sizeof(uint4));
    for (unsigned i = 0; i < launch.threads; ++i) {
      fibers[i].argument.assign(argument, argument + argument_bytes);
      fibers[i].has_waited = !launch.overlaps;
      if (launch.overlaps) fibers[i].argument.assign(argument_bytes, -1);
    }
    run_block();
  }
}

}  // namespace

// Run a launch; return what was wrong with the kernel, or null.
extern "C" const char* launch(void (*function)(const void*), const char* layer, int layer_bytes, const Launch* launch,
                              char* shared, char* shared_end) {
  kernel = function, argument = layer, argument_bytes = layer_bytes, num_threads = launch->threads;
  random_state = launch->seed * 2654435761u | 1u;
  blockDim = {launch->threads, 1, 1};
  if (fibers.size() < launch->threads) fibers.resize(launch->threads);
  for (unsigned i = 0; i < launch->threads; ++i) fibers[i].index = {i, 0, 0};
  std::vector<uint4> dynamic(launch->dynamic_bytes / sizeof(uint4) + 1);
  dynamic_shared = dynamic.data();
  std::vector<unsigned> blocks(launch->grid[0] * launch->grid[1] * launch->grid[2]);
  for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
  if (_setjmp(failed) == 0) {
    run_grid(*launch, blocks, dynamic, shared, shared_end);
    return nullptr;
  }
  fibers.clear();
  ready.clear();
  return failure;
}
