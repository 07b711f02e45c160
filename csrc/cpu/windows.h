// Rows of a convolution's weight, sum_p g_p (patch of x at p)^T for every sample, without the patches: a product that reads
// the image through a table of offsets. The rows are written, or added to a sketch while they are in registers.
#pragma once

#include "sizes.h"

namespace sui {

constexpr Index kWidth = 16;  // of rows: a whole number of vectors of every instruction set

template <class T>
struct Windows {
  const void* x;
  Kind kind_x;
  Index sample, channel, stride[3];  // strides of x [n, channels, size[0], size[1], size[2]], in numbers
  Index channels, size[3], before[3], padded[3];  // zeros before the image, and what it is with those on both sides
  Index planes;        // of the image that is read: channel c, times its sign, is added to plane c mod planes
  const T* sign;       // [channels], or null: as many planes as channels
  const void* g;  // [n, k, o, s], dense
  Kind kind_g;
  Index k, s, i, o;
  const int* base;    // [s]: where the patch of a position begins in a padded image
  const int* offset;  // [i]: where each of its numbers is, from there
};

// How rows become a sketch of a given rank: entry (o, i) goes to (o mod width + place[i]) mod rank with the sign
// sign_o[o] sign_i[i]. A bias is one more i, whose number is 1 at every position.
template <class T>
struct Folding {
  Index width, rank;
  bool ones;
  const int* place;  // [i + ones]
  const T *sign_i, *sign_o;
};

template <class T>
struct WindowKernels {
  Index (*room)(const Windows<T>& windows, Index width, Index rank);
  // out [last - first, k, i, width], width >= o: what is beyond o is zero
  void (*rows)(const Windows<T>& windows, Index first, Index last, Index width, T* room, T* out);
  // out [n, k, rank] += the sketch, for samples first .. last
  void (*fold)(const Windows<T>& windows, const Folding<T>& folding, Index first, Index last, T* room, T* out);
};

template <class T>
const WindowKernels<T>& window_kernels();

template <class T>
void fold_windows(const Windows<T>& windows, const Folding<T>& folding, Index samples, T* out, int threads);

// out [n, k, rank] += the tensor sketch: (place_o[o] + place_i[i]) mod rank; tables of o are [width], zero beyond o.
template <class T>
void scatter_windows(const Windows<T>& windows, Index samples, Index width, const int* place_o, const T* sign_o,
                     const int* place_i, const T* sign_i, Index rank, T* out, int threads);

}  // namespace sui
