// Tables of the eigenvalues, choice of the instruction set, threads.
//
// Threads are started only where they earn more than their start, and are the standard library's: an OpenMP runtime of
// our own beside PyTorch's makes the two pools spin against each other.
#include "removal.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "sui/resolvent.h"

namespace sui {

extern const Kernels kernels_baseline;
#if SUI_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels* kernels;
};

// The best this machine has; SUI_FAST_CPU=baseline or avx2 asks for less (tests, comparisons).
Choice choose() {
#if SUI_X86
  const char* asked = std::getenv("SUI_FAST_CPU");
  const auto within = [&](const char* name) { return !asked || !*asked || !std::strcmp(asked, name); };
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && within("avx512")) return {"avx512", &kernels_avx512};
  if (avx2 && within("avx2")) return {"avx2", &kernels_avx2};
#endif
  return {"baseline", &kernels_baseline};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

constexpr double kThreadWork = 5e6;  // multiplications that pay for one more thread

Index run(const Removal& p, int threads) {
  const Kernels& kernels = *chosen().kernels;
  const double work = double(p.blocks) * double(p.r) * (features(p.m) + p.m) * p.columns;
  const Index parts = std::max<Index>(1, std::min({Index(threads), p.blocks, Index(work / kThreadWork)}));
  const Index room = kernels.scratch(p);
  std::vector<double> scratch(static_cast<std::size_t>(room * parts));
  std::vector<Index> singular(parts);
  std::vector<std::thread> others;
  const auto part = [&](Index i) {
    singular[i] = kernels.run(p, p.blocks * i / parts, p.blocks * (i + 1) / parts, scratch.data() + i * room);
  };
  for (Index i = 1; i < parts; ++i) {
    try {
      others.emplace_back(part, i);
    } catch (const std::system_error&) {  // no more threads to be had
      part(i);
    }
  }
  part(0);
  for (std::thread& other : others) other.join();
  Index total = 0;
  for (const Index count : singular) total += count;
  return total;
}

std::vector<double> padded(const double* values, Index r, Index width) {
  std::vector<double> result(width);
  std::copy(values, values + r, result.begin());
  return result;
}

Index padded_width(Index r) { return (r + kAlign - 1) / kAlign * kAlign; }

}  // namespace

Index converged_removal(const void* u, bool single, Index blocks, int m, Index r, const double* s, const double* g,
                        const double* rest, const double* null, double shift, double* v, double* coef, int threads) {
  const Index width = padded_width(r);
  std::vector<double> table(width);
  for (Index l = 0; l < r; ++l) table[l] = 1 / (s[l] + shift);
  const std::vector<double> gain = padded(g, r, width);
  const Complex scale{1 / shift, 0};
  return run({u, single, blocks, r, m, 1, rest, null, nullptr, 0, v, coef, width, table.data(), gain.data(), &scale,
              nullptr},
             threads);
}

Index rational_removal(const void* u, bool single, Index blocks, int m, Index r, const double* s, const double* g,
                       const double* rest, const double* null, const double* r0, int count, const Complex* poles,
                       const Complex* residues, double constant, double* coef, int threads) {
  const Index width = padded_width(r);
  std::vector<double> table(2 * count * width);
  std::vector<Complex> scale(count);
  for (int q = 0; q < count; ++q) {
    scale[q] = scaled(inverse(poles[q]), -1.0);
    for (Index l = 0; l < r; ++l) {
      const Complex value = resolvent(s[l], poles[q]);
      table[2 * q * width + l] = value.re;
      table[(2 * q + 1) * width + l] = value.im;
    }
  }
  const std::vector<double> gain = padded(g, r, width);
  static const Complex none{};  // no poles: a pointer that is not null says "rational"
  return run({u, single, blocks, r, m, 2 * count, rest, null, r0, constant, nullptr, coef, width, table.data(),
              gain.data(), scale.data(), count ? residues : &none},
             threads);
}

const char* instruction_set() { return chosen().name; }

}  // namespace sui
