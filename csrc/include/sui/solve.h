// Small dense systems, one at a time: the m x m block of the removed rows.
#pragma once

#include "scalar.h"

namespace sui {

// x of matrix x = x by Gaussian elimination with partial pivoting; matrix [m, m] row by row, both overwritten.
// Scalar is double or Complex. Returns false, with NaN in x, for a singular or NaN matrix.
template <class Scalar>
SUI_FN bool solve(Scalar* matrix, Scalar* x, int m) {
  for (int step = 0; step < m; ++step) {
    int pivot = step;
    double largest = magnitude(matrix[step * m + step]);
    for (int row = step + 1; row < m; ++row) {
      const double size = magnitude(matrix[row * m + step]);
      if (size > largest || size != size) {
        largest = size;
        pivot = row;
      }
    }
    if (!(largest > 0)) {
      const double nothing = 0;
      for (int row = 0; row < m; ++row) x[row] = scaled(x[row], nothing / nothing);
      return false;
    }
    if (pivot != step) {
      for (int column = step; column < m; ++column) {
        const Scalar other = matrix[pivot * m + column];
        matrix[pivot * m + column] = matrix[step * m + column];
        matrix[step * m + column] = other;
      }
      const Scalar other = x[pivot];
      x[pivot] = x[step];
      x[step] = other;
    }
    const Scalar reciprocal = inverse(matrix[step * m + step]);
    for (int row = step + 1; row < m; ++row) {
      const Scalar factor = multiply(matrix[row * m + step], reciprocal);
      for (int column = step + 1; column < m; ++column)
        matrix[row * m + column] = subtract(matrix[row * m + column], multiply(factor, matrix[step * m + column]));
      x[row] = subtract(x[row], multiply(factor, x[step]));
    }
    matrix[step * m + step] = reciprocal;
  }
  for (int row = m - 1; row >= 0; --row) {
    Scalar value = x[row];
    for (int column = row + 1; column < m; ++column)
      value = subtract(value, multiply(matrix[row * m + column], x[column]));
    x[row] = multiply(value, matrix[row * m + row]);
  }
  return true;
}

}  // namespace sui
