// Quadratic forms of many vectors with one triangular factor. Plain pointers and sizes; arrays are dense, row by row.
#pragma once

#include "sizes.h"

namespace sui {

// One per instruction set. The factor is packed once and shared; scratch belongs to a thread.
struct TriangularKernels {
  Index (*packed)(Index p, Index r);   // numbers of the packed factor
  Index (*scratch)(Index r);
  void (*pack)(const double* c, Index p, Index r, double* out);
  void (*run)(const double* packed, Index p, Index r, const double* x, Index count, double* scratch, double* out);
};

// out[i] = sum_a (sum_{l >= a} c[a, l] x[i, l])^2 for c [p, r], p <= r; what lies below the diagonal is not read.
void triangular_sqnorm(const double* c, Index p, Index r, const double* x, Index count, double* out, int threads);

}  // namespace sui
