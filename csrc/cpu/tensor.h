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
};

// fourier: out[n, c, 0 or 1, :] += real or imaginary part of the sum over layers and positions of
// fft(u CS_a(a_ns) + i CS_g(g_ncs) / u)^2, in the order of `order`; u is a power of two for each position, 0 where a or g
// is 0. finish: out[row, :] += the sketch of which these are the sums. flat: both for layers of one position and one output,
// out[n, :] += the sketch. keep: table[to[n], :] = factor rows[n, :]; false, and nothing kept, where one is not finite.
template <class T>
struct TensorKernels {
  Index lanes;
  void (*order)(Index rank, int* frequency);
  Index (*fourier_room)(Index rank);
  void (*fourier)(const Layer<T>* layers, Index count, Index first, Index last, Index k, Index s, Index rank,
                  const T* roots, T* room, T* out);  // roots: cosines and sines of -2 pi j / rank
  Index (*finish_room)(Index rank);
  void (*finish)(const T* sums, Index rows, Index rank, const T* roots, const int* place, T* room,
                 T* out);  // place: where each frequency ended
  void (*flat)(const Layer<T>* layers, Index count, Index first, Index last, Index rank, const T* roots,
               const int* place, T* room, T* out);  // room: that of finish
  bool (*keep)(const T* rows, Index count, Index rank, T factor, const Index* to, T* table);
  void (*scatter)(const T* x, Index rows, Index o, Index i, const int* place_o, const T* sign_o, const int* place_i,
                  const T* sign_i, Index rank, T* room, T* out);  // room: 2 rank lanes
  void (*index)(const T* g, Index samples, Index k, Index s, Index o, const Index* token, const int* place_token,
                const T* sign_token, const int* place, const T* sign, Index rank, T* room, T* out);  // room: 2 rank
};

template <class T>
const TensorKernels<T>& tensor_kernels();

constexpr Index kLeastRank = 16, kMostRank = 8192;  // powers of two between them

template <class T>
void fourier(const Layer<T>* layers, Index count, Index samples, Index k, Index s, Index rank, const T* roots, T* out,
             int threads);

template <class T>
void finish(const T* sums, Index rows, Index rank, const T* roots, const int* place, T* out, int threads);

template <class T>
void flat(const Layer<T>* layers, Index count, Index samples, Index rank, const T* roots, const int* place, T* out,
          int threads);

// out[row, (place_o[o] + place_i[i]) mod rank] += sign_o[o] sign_i[i] x[row, o, i].
template <class T>
void scatter_rows(const T* x, Index rows, Index o, Index i, const int* place_o, const T* sign_o, const int* place_i,
                  const T* sign_i, Index rank, T* out, int threads);

// out[n, c, (place_token[token[n, s]] + place[o]) mod rank] += sign_token[token] sign[o] g[n, c, s, o]; -1: no token.
template <class T>
void scatter_index(const T* g, Index samples, Index k, Index s, Index o, const Index* token, const int* place_token,
                   const T* sign_token, const int* place, const T* sign, Index rank, T* out, int threads);

}  // namespace sui
