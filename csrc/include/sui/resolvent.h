// Removing m rows from a resolvent of the NTK.
//
// With f_l = 1 / (s_l - p) and the removed rows u [m, r] of the eigenvectors, the removed block of the resolvent and its
// right-hand side are
//     G = u diag(f) u^T + scale null,   h = u (f g) + scale rest,   y = G^-1 h,   scale = -1 / p.
// The sums over l are the moments of the block against f: one number for every pair a <= b, row by row, then one for
// every row of u g. A block has features(m) of them; `columns` of them (several f, real and imaginary parts) lie together.
#pragma once

#include "solve.h"

namespace sui {

SUI_FN int features(int m) { return m * (m + 3) / 2; }

// 1 / (s - pole)
SUI_FN Complex resolvent(double s, Complex pole) { return inverse(Complex{s - pole.re, -pole.im}); }

// y [m] from moments [features(m), columns], of which f is the number at `column`; null [m, m], rest [m], matrix [m, m]
// is room to work in. False: G is singular.
template <class Scalar>
SUI_FN bool solve_removed(const double* moments, int columns, int column, int m, const double* null, const double* rest,
                          Scalar scale, Scalar* matrix, Scalar* y) {
  const double* at = moments + column;
  for (int a = 0; a < m; ++a) {
    for (int b = a; b < m; ++b, at += columns) {
      Scalar value;
      load(at, value);
      matrix[a * m + b] = add(value, scaled(scale, null[a * m + b]));
      matrix[b * m + a] = add(value, scaled(scale, null[b * m + a]));
    }
  }
  for (int a = 0; a < m; ++a, at += columns) {
    Scalar value;
    load(at, value);
    y[a] = add(value, scaled(scale, rest[a]));
  }
  return solve(matrix, y, m);
}

}  // namespace sui
