// Tables of the eigenvalues, and blocks shared among threads.
#include "removal.h"

#include <cstring>

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

Index run(const Removal& p, int threads) {
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

}  // namespace sui
