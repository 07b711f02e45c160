// Block leave-one-out on the CPU. Plain pointers and sizes; arrays are dense, row by row.
#pragma once

#include "sizes.h"
#include "sui/scalar.h"

namespace sui {

constexpr int kMostRows = 64;  // of a block; beyond it the elimination, not the sums over r, would set the pace

// What both ops share: blocks of m rows of the eigenvectors, a table of functions of the eigenvalues.
struct Removal {
  const void* u;       // [blocks, m, r], float or double
  bool single;         // u is float
  Index blocks, r;
  int m, columns;      // rows of the table
  const double* rest;  // [blocks, m]
  const double* null;  // [blocks, m, m]
  const double* r0;    // [blocks, m]; nullptr: zeros
  double constant;
  double* v;           // [blocks, m], real form only
  double* coef;        // [blocks, r]
  Index width;         // r rounded up to kAlign, zeros beyond r
  const double* table; // [columns, width]: one row (real form), or real and imaginary part of every pole's resolvent
  const double* gain;  // [width], g; real form: w g
  const Complex* scale;     // per pole (-1 / p), or 1 / shift in the real part
  const Complex* residues;  // per pole; nullptr: real form
};

constexpr Index kAlign = 8;  // doubles of the widest vector

// One per instruction set: doubles of scratch wanted, and the work on blocks [begin, end); returns singular blocks.
struct Kernels {
  Index (*scratch)(const Removal&);
  Index (*run)(const Removal&, Index begin, Index end, double* scratch);
};

// v = G^-1 (u (w g) + rest / shift), coef = -w (u^T v), w = 1 / (s + shift), G = u diag(w) u^T + null / shift.
// Both return the number of blocks whose system is singular (their results are NaN).
Index converged_removal(const void* u, bool single, Index blocks, int m, Index r, const double* s, const double* g,
                        const double* rest, const double* null, double shift, double* v, double* coef, int threads);

// coef = -constant u^T r0 - sum_q Re(c_q S_q (u^T y_q)), S_q = 1 / (s - p_q), y_q as in sui/resolvent.h.
Index rational_removal(const void* u, bool single, Index blocks, int m, Index r, const double* s, const double* g,
                       const double* rest, const double* null, const double* r0, int count, const Complex* poles,
                       const Complex* residues, double constant, double* coef, int threads);

// The same coef plus base, of which only sums are kept: reached = u (s (coef + trained)) [blocks, m],
// sqnorm = sum_l s_l coef_l^2 [blocks], form = ||c coef||^2 [blocks], c upper triangular [rows, r]. u is double. Of single
// rows (m = 1) rest and null are not read: they are what u misses of the residual and of 1 where `outside`, else zero.
Index rational_sums(const double* u, Index blocks, int m, Index r, const double* s, const double* g, const double* r0,
                    bool outside, const double* rest, const double* null, int count, const Complex* poles,
                    const Complex* residues, double constant, const double* base, const double* trained, const double* c,
                    Index rows, double* reached, double* sqnorm, double* form, int threads);

}  // namespace sui
