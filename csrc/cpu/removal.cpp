// Tables of the eigenvalues, and blocks shared among threads.
#include "removal.h"

#include <numeric>

#include "sui/resolvent.h"
#include "triangular.h"
#include "variant.h"

namespace sui {

SUI_VARIANTS(Kernels, kernels)

namespace {

Index run(const Removal& p, int threads) {
  const Kernels& kernels = choose(kernels_variants);
  const double work = double(p.blocks) * double(p.r) * (features(p.m) + p.m) * p.columns;
  const Index parts = parts_for(p.blocks, work, threads), room = kernels.scratch(p);
  std::vector<double> scratch(static_cast<std::size_t>(room * parts));
  std::vector<Index> singular(parts);
  in_parts(p.blocks, parts, [&](Index part, Index begin, Index end) {
    singular[part] = kernels.run(p, begin, end, scratch.data() + part * room);
  });
  return std::accumulate(singular.begin(), singular.end(), Index{0});
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

namespace {

// What the poles make of the eigenvalues.
struct Poles {
  std::vector<double> table, gain;
  std::vector<Complex> scale;

  Poles(Index r, const double* s, const double* g, int count, const Complex* poles)
      : table(2 * count * padded_width(r)), gain(padded(g, r, padded_width(r))), scale(count) {
    const Index width = padded_width(r);
    for (int q = 0; q < count; ++q) {
      scale[q] = scaled(inverse(poles[q]), -1.0);
      for (Index l = 0; l < r; ++l) {
        const Complex value = resolvent(s[l], poles[q]);
        table[2 * q * width + l] = value.re;
        table[(2 * q + 1) * width + l] = value.im;
      }
    }
  }
};

constexpr Complex kNone{};  // no poles: a pointer that is not null says "rational"

}  // namespace

Index rational_removal(const void* u, bool single, Index blocks, int m, Index r, const double* s, const double* g,
                       const double* rest, const double* null, const double* r0, int count, const Complex* poles,
                       const Complex* residues, double constant, double* coef, int threads) {
  const Poles made(r, s, g, count, poles);
  return run({u, single, blocks, r, m, 2 * count, rest, null, r0, constant, nullptr, coef, padded_width(r),
              made.table.data(), made.gain.data(), made.scale.data(), count ? residues : &kNone},
             threads);
}

Index rational_sums(const double* u, Index blocks, int m, Index r, const double* s, const double* g, const double* r0,
                    bool outside, const double* rest, const double* null, int count, const Complex* poles,
                    const Complex* residues, double constant, const double* base, const double* trained, const double* c,
                    Index rows, double* reached, double* sqnorm, double* form, int threads) {
  const Poles made(r, s, g, count, poles);
  const Removal all{u, false, blocks, r, m, 2 * count, rest, null, r0, constant, nullptr, nullptr, padded_width(r),
                    made.table.data(), made.gain.data(), made.scale.data(), count ? residues : &kNone};
  const Kernels& kernels = choose(kernels_variants);
  const TriangularKernels& forms = triangular_kernels();
  std::vector<double> packed(static_cast<std::size_t>(forms.packed(rows, r)));
  forms.pack(c, rows, r, packed.data());
  const double work = double(blocks) * double(r) * (double(features(m) + m) * 2 * count + double(rows) / 2);
  const Index parts = parts_for(blocks, work, threads);
  std::vector<Index> singular(parts);
  if (m == 1) {
    std::vector<double> table(static_cast<std::size_t>(forms.single_table(2 * count, r)));
    forms.pack_singles(all, table.data());
    const Index each = forms.single_scratch(2 * count, r);
    std::vector<double> scratch(static_cast<std::size_t>(each * parts));
    in_parts(blocks, parts, [&](Index part, Index begin, Index end) {
      singular[part] = forms.singles(all, outside, table.data(), base, trained, s, packed.data(), rows, begin, end,
                                     scratch.data() + part * each, reached, sqnorm, form);
    });
    return std::accumulate(singular.begin(), singular.end(), Index{0});
  }
  const Index room = kernels.scratch(all), turned = forms.scratch(r);
  const Index each = room + turned + kGroups * r;
  std::vector<double> scratch(static_cast<std::size_t>(each * parts));
  in_parts(blocks, parts, [&](Index part, Index begin, Index end) {
    double *own = scratch.data() + part * each, *coef = own + room + turned;
    for (Index first = begin; first < end; first += kGroups) {
      const Index held = std::min(kGroups, end - first);
      Removal some = all;
      some.u = u + first * m * r;
      some.rest = rest + first * m, some.null = null + first * m * m, some.r0 = r0 + first * m;
      some.blocks = held, some.coef = coef;
      singular[part] += kernels.run(some, 0, held, own);
      forms.weigh(coef, base, trained, s, u + first * m * r, m, r, held, sqnorm + first, reached + first * m);
      forms.run(packed.data(), rows, r, coef, held, own + room, form + first);
    }
  });
  return std::accumulate(singular.begin(), singular.end(), Index{0});
}

}  // namespace sui
