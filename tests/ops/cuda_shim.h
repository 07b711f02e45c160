// CUDA C++ on the CPU, for tests: every thread of a block is a fiber, a barrier is a turn of all fibers. One block at a time,
// so atomics need no care; shared memory is filled with NaN before each block.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

namespace shim {

inline Dim thread, block, block_size, grid_size;
inline std::vector<double> shared_memory;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  Dim thread;
  int barriers = 0;
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t home;
inline Fiber* current;
inline const std::function<void()>* work;
inline std::vector<double> lanes;

inline void enter() {
  (*work)();
  current->done = true;
}

inline void barrier() {
  ++current->barriers;
  swapcontext(&current->context, &home);
}

// Threads that leave a barrier to others, or reach different numbers of them, are a deadlock on a GPU.
inline void run_block() {
  for (Fiber& fiber : fibers) {
    fiber.barriers = 0;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &home;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool live = true; live;) {
    live = false;
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      current = &fiber;
      thread = fiber.thread;
      swapcontext(&home, &fiber.context);
      live |= !fiber.done;
    }
    for (const Fiber& fiber : fibers) {
      if (fiber.barriers != fibers[0].barriers || fiber.done != fibers[0].done) {
        std::fprintf(stderr, "a barrier is not reached by all threads\n");
        std::abort();
      }
    }
  }
}

inline void launch(long long gx, long long gy, long long threads, long long shared, const std::function<void()>& kernel) {
  grid_size = {unsigned(gx), unsigned(gy), 1};
  block_size = {unsigned(threads), 1, 1};
  fibers = std::vector<Fiber>(threads);
  lanes.assign(threads, 0);
  for (unsigned t = 0; t < threads; ++t) fibers[t].thread = {t, 0, 0};
  work = &kernel;
  for (unsigned y = 0; y < gy; ++y)
    for (unsigned x = 0; x < gx; ++x) {
      block = {x, y, 0};
      // exactly what was asked for, and guarded: what lies beyond must still be there afterwards
      const std::size_t count = (shared + 7) / 8;
      shared_memory.assign(count + 64, std::numeric_limits<double>::quiet_NaN());
      for (std::size_t i = count; i < count + 64; ++i) shared_memory[i] = 12345.0;
      run_block();
      for (std::size_t i = count; i < count + 64; ++i)
        if (shared_memory[i] != 12345.0) {
          std::fprintf(stderr, "a kernel wrote beyond its shared memory\n");
          std::abort();
        }
    }
}

}  // namespace shim

#define threadIdx shim::thread
#define blockIdx shim::block
#define blockDim shim::block_size
#define gridDim shim::grid_size

inline void __syncthreads() { shim::barrier(); }

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

inline double __shfl_down_sync(unsigned, double value, int offset) {
  const unsigned own = shim::thread.x;
  shim::lanes[own] = value;
  shim::barrier();
  const bool inside = own % 32 + offset < 32 && own + offset < shim::lanes.size();
  const double found = inside ? shim::lanes[own + offset] : value;
  shim::barrier();
  return found;
}

inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int bit = 0; bit < 32; ++bit) y |= ((x >> bit) & 1u) << (31 - bit);
  return y;
}
