// The fibers behind emulator.h. Clusters run one after the other in a shuffled order. Of a cluster any block that can
// go on does, until all its fibers wait for other blocks; its shared memory is put in its place meanwhile. Of a block's
// fibers any that can go on does: drawn at random, or the last that became ready, so that one warp runs ahead of the
// others as far as barriers let it. Kernels that depend on an order of threads that no barrier gives them come to
// grief.
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
  std::vector<char> argument;  // the thread's own
  bool is_new = true, has_waited;
};

// The lanes of a warp hand over numbers in turns; two turns' numbers are kept, since a lane may be one turn ahead.
struct Warp {
  unsigned numbers[2][kWarp];
  int turn = 0, arrived = 0, line = 0;
};

struct Block {
  uint3 index;
  std::vector<char> shared;  // while another block runs
  std::vector<uint4> dynamic;
  std::vector<Warp> warps;
  std::vector<int> ready;  // fibers that can go on
  int at_barrier = 0, barrier_line = 0, num_done = 0;
};

std::vector<Fiber> fibers;  // of the cluster, block by block
std::vector<Block> blocks;
int current, num_threads, at_cluster, cluster_line;
char* shared;  // where the running block's memory is
jmp_buf scheduler, failed;
char failure[200];
void (*kernel)(const void*);
const char* argument;
int argument_bytes;
unsigned random_state = 1;

Block& block_of(int fiber) { return blocks[fiber / num_threads]; }

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
  threadIdx = {static_cast<unsigned>(current % num_threads), 0, 0};
}

void run_fiber() {
  for (;;) {
    threadIdx = {static_cast<unsigned>(current % num_threads), 0, 0};
    kernel(fibers[current].argument.data());
    if (!fibers[current].has_waited) fail("a thread ends that has not waited for the kernel before", 0, 0);
    ++block_of(current).num_done;
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

// Run a block as far as it can go; once it has ended, its memory is no number.
void run_block(Block& block) {
  blockIdx = block.index;
  dynamic_shared = block.dynamic.data();
  std::memcpy(shared, block.shared.data(), block.shared.size());
  const bool is_random = draw(2);
  while (!block.ready.empty()) {
    const unsigned place = is_random ? draw(block.ready.size()) : block.ready.size() - 1;
    const int fiber = block.ready[place];
    block.ready[place] = block.ready.back();
    block.ready.pop_back();
    resume(fiber);
  }
  block.shared.assign(shared, shared + block.shared.size());
  if (block.num_done == num_threads) block.shared.assign(block.shared.size(), -1);
}

void run_cluster() {
  at_cluster = 0;
  for (;;) {
    std::vector<Block*> able;
    for (Block& block : blocks)
      if (!block.ready.empty()) able.push_back(&block);
    if (able.empty()) break;
    run_block(*able[draw(able.size())]);
  }
  for (const Block& block : blocks)
    if (block.num_done < num_threads)
      fail("threads wait for others that have ended or wait elsewhere", block.barrier_line, cluster_line);
}

// Take part in a turn of the warp, and go on once all lanes have.
const unsigned* hand_over(unsigned number, int line) {
  const int first = current / kWarp * kWarp;
  Block& block = block_of(current);
  Warp& warp = block.warps[current % num_threads / kWarp];
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
    if (lane != current) block.ready.push_back(lane);
  return numbers;
}

}  // namespace

void wait_for_block(int line) {
  Block& block = block_of(current);
  if (block.at_barrier > 0 && block.barrier_line != line)
    fail("threads of a block are at different barriers", block.barrier_line, line);
  block.barrier_line = line;
  if (++block.at_barrier < num_threads) return pause();
  block.at_barrier = 0;
  const int first = current / num_threads * num_threads;
  for (int i = first; i < first + num_threads; ++i)
    if (i != current) block.ready.push_back(i);
}

void wait_for_blocks(int line) {
  if (at_cluster > 0 && cluster_line != line)
    fail("threads of a cluster are at different barriers", cluster_line, line);
  cluster_line = line;
  const int num_fibers = blocks.size() * num_threads;
  if (++at_cluster < num_fibers) return pause();
  at_cluster = 0;
  for (int i = 0; i < num_fibers; ++i)
    if (i != current) block_of(i).ready.push_back(i);
}

float of_block(const float* own, int rank) {
  if (rank == current / num_threads) return *own;
  float x;
  std::memcpy(&x, blocks[rank].shared.data() + (reinterpret_cast<const char*>(own) - shared), sizeof(x));
  return x;
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
  unsigned grid[3], threads, dynamic_bytes, cluster, overlaps, seed;
};

// Make the blocks of a cluster ready, from this one on along y. Their memory is no number.
void begin_cluster(const Launch& launch, uint3 index, size_t shared_bytes) {
  blocks.assign(launch.cluster, Block());
  for (Block& block : blocks) {
    block.index = index;
    ++index.y;
    block.shared.assign(shared_bytes, -1);
    block.dynamic.resize(launch.dynamic_bytes / sizeof(uint4) + 1);
    std::memset(block.dynamic.data(), 0xff, block.dynamic.size() * sizeof(uint4));
    block.warps.resize(num_threads / kWarp);
    const int first = (&block - blocks.data()) * num_threads;
    const bool is_reversed = draw(2);
    for (int i = 0; i < num_threads; ++i) block.ready.push_back(first + (is_reversed ? num_threads - 1 - i : i));
  }
  for (Fiber& fiber : fibers) {
    fiber.argument.assign(argument, argument + argument_bytes);
    if (launch.overlaps) fiber.argument.assign(argument_bytes, -1);
    fiber.has_waited = !launch.overlaps;
  }
}

}  // namespace

// Run all blocks of a launch; return what was wrong with the kernel, or null.
extern "C" const char* launch(void (*function)(const void*), const char* layer, int layer_bytes, const Launch* launch,
                              char* start, char* end) {
  const unsigned *grid = launch->grid, rows = grid[1] / launch->cluster;
  kernel = function, argument = layer, argument_bytes = layer_bytes, num_threads = launch->threads, shared = start;
  random_state = launch->seed * 2654435761u | 1u;
  blockDim = {launch->threads, 1, 1};
  fibers.resize(launch->cluster * launch->threads);
  std::vector<unsigned> clusters(grid[0] * rows * grid[2]);
  for (unsigned i = 0; i < clusters.size(); ++i) clusters[i] = i;
  if (_setjmp(failed) != 0) {
    fibers.clear();
    return failure;
  }
  for (unsigned left = clusters.size(); left > 0; --left) {
    const unsigned place = draw(left), cluster = clusters[place];
    clusters[place] = clusters[left - 1];
    begin_cluster(*launch, {cluster % grid[0], cluster / grid[0] % rows * launch->cluster, cluster / grid[0] / rows},
                  end - start);
    run_cluster();
  }
  return nullptr;
}
