// Rows of a layer's Jacobian: written out, or hashed into a sketch. Plain pointers and sizes; arrays are dense, row by
// row; T is float or double.
#pragma once

#include "sizes.h"

namespace sui {

// A parameter's part of the rows: g a^T of one position, or g itself where a is null.
template <class T>
struct Piece {
  const T *g, *a;       // [n, k, o], [n, i]
  Index o, i, column;   // i = 1 where a is null; first column of the rows
};

// Where the random numbers of a table come from (sui/philox.h).
struct Stream {
  unsigned word, stream;
  unsigned long long seed;
};

// Rows that share one pass over the hash of an sjlt: as many as keep their sums in the second cache.
constexpr Index kLeastGroup = 16, kMostGroup = 64, kGroupRoom = 1 << 18;

// One per instruction set. room: rank numbers for each row of a group.
template <class T>
struct RowKernels {
  void (*write)(const Piece<T>* pieces, Index count, Index first, Index samples, Index k, T* out, Index pitch);
  void (*hash)(const Stream&, Index begin, Index count, Index buckets, int* place, T* sign);
  void (*signs)(const Stream&, Index begin, Index rows, Index columns, T size, T* out);
  void (*sjlt)(const Stream&, const T* x, Index rows, Index begin, Index length, Index pitch, Index rank, T* room,
               T* out);
};

template <class T>
const RowKernels<T>& row_kernels();

// What uses threads; `row_kernels` has the rest.

// out[row, place(e)] += sign(e) x[row, e - begin], e = begin .. begin + length; rows of x lie `pitch` apart.
template <class T>
void sjlt(const Stream&, const T* x, Index rows, Index begin, Index length, Index pitch, Index rank, T* out,
          int threads);

}  // namespace sui
