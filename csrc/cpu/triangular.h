// Quadratic forms of many vectors, with one triangular factor or a diagonal. Plain pointers and sizes; arrays are dense, row by row.
#pragma once

#include "sizes.h"

namespace sui {

// One per instruction set. The factor is packed once and shared; scratch belongs to a thread.
struct TriangularKernels {
  Index (*packed)(Index p, Index r);   // numbers of the packed factor
  Index (*scratch)(Index r);
  void (*pack)(const double* c, Index p, Index r, double* out);
  void (*run)(const double* packed, Index p, Index r, const double* x, Index count, double* scratch, double* out);
  // x += base; sqnorm[i] = sum_l s_l x_il^2; inner[i, a] = sum_l s_l x_il u[i, a, l] for m rows u of every vector
  void (*weigh)(double* x, const double* base, const double* s, const double* u, Index m, Index r, Index count,
                double* sqnorm, double* inner);
};

const TriangularKernels& triangular_kernels();

constexpr Index kGroups = 96;  // vectors at a time: a whole number of groups of every instruction set

// out[i] = sum_a (sum_{l >= a} c[a, l] x[i, l])^2 for c [p, r], p <= r; what lies below the diagonal is not read.
void triangular_sqnorm(const double* c, Index p, Index r, const double* x, Index count, double* out, int threads);

}  // namespace sui
