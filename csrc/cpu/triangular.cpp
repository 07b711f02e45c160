// Choice of the instruction set, threads and room for csrc/cpu/triangular_kernels.cpp.
#include "triangular.h"

#include "variant.h"

namespace sui {

SUI_VARIANTS(TriangularKernels, triangular)

const TriangularKernels& triangular_kernels() { return choose(triangular_variants); }

void triangular_sqnorm(const double* c, Index p, Index r, const double* x, Index count, double* out, int threads) {
  const TriangularKernels& kernels = triangular_kernels();
  std::vector<double> packed(static_cast<std::size_t>(kernels.packed(p, r)));
  kernels.pack(c, p, r, packed.data());
  const Index parts = parts_for(count, double(count) * double(p) * double(r) / 2, threads), room = kernels.scratch(r);
  std::vector<double> scratch(static_cast<std::size_t>(room * parts));
  in_parts(count, parts, [&](Index part, Index begin, Index end) {
    kernels.run(packed.data(), p, r, x + begin * r, end - begin, scratch.data() + part * room, out + begin);
  });
}

void product_sqnorm(const Rows& a, Index a_step, const Rows& m, Index m_step, const Rows& base, Index p, Index count,
                    double* out, int threads) {
  const TriangularKernels& kernels = triangular_kernels();
  const Index parts = parts_for(count, double(count) * double(a.count) * double(m.count) * double(p), threads);
  const Index room = kernels.product_scratch(a.count, m.count);
  std::vector<double> scratch(static_cast<std::size_t>(room * parts));
  in_parts(count, parts, [&](Index part, Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      kernels.products({a.at + i * a_step, a.count, a.stride}, {m.at + i * m_step, m.count, m.stride}, base, p,
                       scratch.data() + part * room, out + i * a.count);
  });
}

}  // namespace sui
