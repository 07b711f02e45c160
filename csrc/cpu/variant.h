// Which instruction set runs, and how work is shared among threads.
//
// Threads are started only where they earn more than their start, and are the standard library's: an OpenMP runtime of
// our own beside PyTorch's makes the two pools spin against each other.
#pragma once

#include <algorithm>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#include "sizes.h"

namespace sui {

// The best of three objects compiled from one source; null where this build has none for the instruction set.
template <class Table>
struct Variants {
  const Table *baseline, *avx2, *avx512;
};

enum class InstructionSet { baseline, avx2, avx512 };
InstructionSet chosen_instruction_set();
const char* instruction_set();

template <class Table>
const Table& choose(const Variants<Table>& variants) {
  switch (chosen_instruction_set()) {
    case InstructionSet::avx512: return *variants.avx512;
    case InstructionSet::avx2: return *variants.avx2;
    default: return *variants.baseline;
  }
}

// Declares the tables that one source leaves in its three objects, and NAME_variants to choose from.
#if SUI_X86
#define SUI_VARIANTS(Table, name)                                \
  extern const Table name##_baseline, name##_avx2, name##_avx512; \
  constexpr Variants<Table> name##_variants{&name##_baseline, &name##_avx2, &name##_avx512};
#else
#define SUI_VARIANTS(Table, name)      \
  extern const Table name##_baseline; \
  constexpr Variants<Table> name##_variants{&name##_baseline, nullptr, nullptr};
#endif

// The same for a table of each type, and the function that gives the chosen one.
#define SUI_TYPED_VARIANTS(Table, name, function)                                              \
  SUI_VARIANTS(Table<float>, name##_float)                                                     \
  SUI_VARIANTS(Table<double>, name##_double)                                                   \
  template <>                                                                                  \
  const Table<float>& function() {                                                             \
    return choose(name##_float_variants);                                                      \
  }                                                                                            \
  template <>                                                                                  \
  const Table<double>& function() {                                                            \
    return choose(name##_double_variants);                                                     \
  }

constexpr double kThreadWork = 5e6;  // multiplications that pay for one more thread

inline Index parts_for(Index items, double work, int threads) {
  return std::max<Index>(1, std::min({Index(threads), items, Index(work / kThreadWork)}));
}

// call(part, begin, end) for parts of 0..items, the first in this thread. What a part throws is thrown here, after all.
template <class Call>
void in_parts(Index items, Index parts, const Call& call) {
  std::vector<std::exception_ptr> failed(parts);
  const auto part = [&](Index i) {
    try {
      call(i, items * i / parts, items * (i + 1) / parts);
    } catch (...) {
      failed[i] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(parts);
  for (Index i = 1; i < parts; ++i) {
    try {
      others.emplace_back(part, i);
    } catch (const std::system_error&) {  // no more threads to be had
      part(i);
    }
  }
  part(0);
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& failure : failed)
    if (failure) std::rethrow_exception(failure);
}

}  // namespace sui
