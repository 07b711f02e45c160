// The tensor sketch: sums over positions in the Fourier domain, and the scatter of formed rows, many rows at a time.
// T is float or double.
#pragma once

#include "sizes.h"

namespace sui {

// One side of the rows sum_s g a^T with the hash of its features.
template <class T>
struct Side {
  const void* x;
  Kind kind;
  Index sample, output, position, feature;  // strides in numbers; position or feature is 1
  Index length;
  bool ones;  // one more feature, 1 everywhere: a bias
  const int* place;  // [length + ones]
  const T* sign;     // [length + ones]
};

template <class T>
struct Layer {
  Side<T> a, g;
  int ring = 0;  // the side that has places on one ring only: 1 a, 2 g, 0 neither (and length is rank)
};

// fourier: out[n, c, :] += the sum over layers and positions of fft(CS_a(a_ns)) fft(CS_g(g_ncs)), rank real numbers.
// Where one side has places on a ring of `length` only, the other one is on as many such rings as the rank holds: number b
// of ring q is place b (rank / length) + q of the sketch.
// finish: out[row, :] += the sketch of which these are the sums. keep: table[to[n], :] = factor rows[n, :]; false, and
// nothing kept, where one is not finite.
template <class T>
struct TensorKernels {
  Index lanes;
  Index (*fourier_room)(Index rank);
  void (*fourier)(const Layer<T>* layers, Index count, Index first, Index last, Index k, Index s, Index rank,
                  Index length, T* room, T* out);
  void (*finish)(const T* sums, Index rows, Index rank, Index length, T* room, T* out);  // room: rank lanes
  // out[n, :] += the sketches of layers of one position and one output; length: of the transforms; room: fourier_room
  void (*flat)(const Layer<T>* layers, Index count, Index first, Index last, Index rank, Index length, T* room, T* out);
  bool (*keep)(const T* rows, Index count, Index rank, T factor, const Index* to, T* table);
  void (*scatter)(const T* x, Index rows, Index o, Index i, const int* place_o, const T* sign_o, const int* place_i,
                  const T* sign_i, Index rank, T* room, T* out);  // room: 2 rank lanes
  void (*index)(const T* g, Index samples, Index k, Index s, Index o, const Index* token, const int* place_token,
                const T* sign_token, const int* place, const T* sign, Index rank, T* room, T* out);  // room: 2 rank
};

template <class T>
const TensorKernels<T>& tensor_kernels();

template <class T>
void fourier(const Layer<T>* layers, Index count, Index samples, Index k, Index s, Index rank, Index length, T* out,
             int threads);

template <class T>
void flat(const Layer<T>* layers, Index count, Index samples, Index rank, Index length, T* out, int threads);

template <class T>
void finish(const T* sums, Index rows, Index rank, Index length, T* out, int threads);

// out[row, (place_o[o] + place_i[i]) mod rank] += sign_o[o] sign_i[i] x[row, o, i].
template <class T>
void scatter_rows(const T* x, Index rows, Index o, Index i, const int* place_o, const T* sign_o, const int* place_i,
                  const T* sign_i, Index rank, T* out, int threads);

// out[n, c, (place_token[token[n, s]] + place[o]) mod rank] += sign_token[token] sign[o] g[n, c, s, o]; -1: no token.
template <class T>
void scatter_index(const T* g, Index samples, Index k, Index s, Index o, const Index* token, const int* place_token,
                   const T* sign_token, const int* place, const T* sign, Index rank, T* out, int threads);

}  // namespace sui
