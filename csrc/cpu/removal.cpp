// Tables of the eigenvalues, and blocks shared among threads.
#include "removal.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

#include "sui/resolvent.h"
#include "variant.h"

namespace sui {

extern const Kernels kernels_baseline;
#if SUI_X86
extern const Kernels kernels_avx2, kernels_avx512;
#endif

namespace {

#if SUI_X86
constexpr Variants<Kernels> kVariants{&kernels_baseline, &kernels_avx2, &kernels_avx512};
#else
constexpr Variants<Kernels> kVariants{&kernels_baseline, nullptr, nullptr};
#endif

// A large result is fresh memory, and its first touch costs more than the arithmetic: ask for pages of 2 MB.
void prefer_large_pages(void* address, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 1 << 21;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(address) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(address) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failing is no matter
#else
  (void)address, (void)bytes;
#endif
}

Index run(const Removal& p, int threads) {
  prefer_large_pages(p.coef, static_cast<std::size_t>(p.blocks * p.r) * sizeof(double));
  const Kernels& kernels = choose(kVariants);
  const double work = double(p.blocks) * double(p.r) * (features(p.m) + p.m) * p.columns;
  const Index parts = parts_for(p.blocks, work, threads), room = kernels.scratch(p);
  std::vector<double> scratch(static_cast<std::size_t>(room * parts));
  std::vector<Index> singular(parts);
  in_parts(p.blocks, parts, [&](Index part, Index begin, Index end) {
    singular[part] = kernels.run(p, begin, end, scratch.data() + part * room);
  });
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
  std::vector<double> gain(width);
  for (Index l = 0; l < r; ++l) gain[l] = table[l] * g[l];
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

}  // namespace sui
