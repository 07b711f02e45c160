// Quadratic forms of many vectors, with one triangular factor or a diagonal. Plain pointers and sizes; arrays are dense, row by row.
#pragma once

#include "removal.h"
#include "sizes.h"

namespace sui {

// Rows of a matrix: count of them, each `stride` numbers after the one before.
struct Rows {
  const double* at;
  Index count, stride;
};

// One per instruction set. The factor is packed once and shared; scratch belongs to a thread.
struct TriangularKernels {
  Index (*packed)(Index p, Index r);   // numbers of the packed factor
  Index (*scratch)(Index r);
  void (*pack)(const double* c, Index p, Index r, double* out);
  void (*run)(const double* packed, Index p, Index r, const double* x, Index count, double* scratch, double* out);
  // x += base; sqnorm[i] = sum_l s_l x_il^2; inner[i, a] = sum_l s_l (x_il + trained_l) u[i, a, l] for m rows u of every vector
  void (*weigh)(double* x, const double* base, const double* trained, const double* s, const double* u, Index m, Index r,
                Index count, double* sqnorm, double* inner);
  // Changes as single rows leave, plus base (all.m = 1): sums as in rational_sums for rows [begin, end) of all.u, with c packed;
  // returns singular rows.
  Index (*single_table)(Index columns, Index r);  // numbers of the packed table
  Index (*single_scratch)(Index columns, Index r);
  void (*pack_singles)(const Removal& all, double* out);
  Index (*singles)(const Removal& all, bool outside, const double* table, const double* base, const double* trained,
                   const double* s, const double* c, Index p, Index begin, Index end, double* scratch, double* reached,
                   double* sqnorm, double* form);
  Index (*product_scratch)(Index t, Index v);
  // out[i] = sum_j (base[i, j] + sum_l a[i, l] m[l, j])^2 for a [t, v], m [v, p], base [t, p]
  void (*products)(const Rows& a, const Rows& m, const Rows& base, Index p, double* scratch, double* out);
};

const TriangularKernels& triangular_kernels();

constexpr Index kGroups = 96;  // vectors at a time: a whole number of groups of every instruction set

// out[i] = sum_a (sum_{l >= a} c[a, l] x[i, l])^2 for c [p, r], p <= r; what lies below the diagonal is not read.
void triangular_sqnorm(const double* c, Index p, Index r, const double* x, Index count, double* out, int threads);

// The same for many a and m, `a_step` and `m_step` numbers apart, and one base; out [count, t].
void product_sqnorm(const Rows& a, Index a_step, const Rows& m, Index m_step, const Rows& base, Index p, Index count,
                    double* out, int threads);

}  // namespace sui
