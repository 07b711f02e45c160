// CUDA C++ on the CPU, for tests. Every thread of a block is a fiber that runs to its next barrier (of the block, or of
// the warp at a shuffle). Which warps move and who of them goes first is left to chance: where a barrier is missing,
// somebody reads too early or writes too soon. One block at a time, so atomics need no care; shared memory is filled
// with NaN before each block, and what lies beyond is guarded.
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

struct alignas(16) double2 {
  double x, y;
};

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
  bool done = false;
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

constexpr unsigned kWarp = 32;
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warps;
inline Barrier whole;
inline ucontext_t home;
inline Fiber* current;
inline const std::function<void()>* work;
inline std::vector<double> lanes;
inline unsigned long long chance = 1;
inline bool progress;

inline unsigned long long draw() {
  chance = chance * 6364136223846793005ull + 1442695040888963407ull;
  return chance >> 33;
}

inline void enter() {
  (*work)();
  current->done = progress = true;
}

inline void wait(Barrier& barrier, unsigned threads) {
  Fiber& self = *current;
  const unsigned mine = barrier.generation;
  progress = true;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  do swapcontext(&self.context, &home);
  while (barrier.generation == mine);
  progress = true;
}

// Threads that leave a barrier to others are a deadlock on a GPU.
inline void run_block() {
  whole = {};
  warps.assign((fibers.size() + kWarp - 1) / kWarp, {});
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &home;
    makecontext(&fiber.context, enter, 0);
  }
  const unsigned count = unsigned(fibers.size());
  constexpr unsigned long long all = ~0ull;
  unsigned long long moving = all;  // warps, one bit each; a chosen few go on until they must wait for the others
  for (bool live = true; live;) {
    live = progress = false;
    const unsigned first = unsigned(draw()) % count;
    const bool up = draw() & 1;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned t = (up ? first + i : first + count - i) % count;
      if (fibers[t].done) continue;
      live = true;
      if (!(moving >> t / kWarp & 1)) continue;
      current = &fibers[t];
      thread = current->thread;
      swapcontext(&home, &current->context);
    }
    if (live && moving == all && !progress) {
      std::fprintf(stderr, "a barrier is not reached by all threads\n");
      std::abort();
    }
    if (moving == all)
      moving = draw();
    else if (!progress)
      moving = all;
  }
}

inline void launch(long long gx, long long gy, long long threads, long long shared,
                   const std::function<void()>& kernel) {
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

inline void __syncthreads() { shim::wait(shim::whole, unsigned(shim::fibers.size())); }

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

inline double __shfl_xor_sync(unsigned, double value, int mask) {
  const unsigned own = shim::thread.x;
  shim::Barrier& warp = shim::warps[own / shim::kWarp];
  shim::lanes[own] = value;
  shim::wait(warp, shim::kWarp);
  const double found = shim::lanes[own ^ mask];
  shim::wait(warp, shim::kWarp);
  return found;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int bit = 0; bit < 32; ++bit) y |= ((x >> bit) & 1u) << (31 - bit);
  return y;
}
