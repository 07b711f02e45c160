// Rows of convolutions, compiled once per instruction set as rows_kernels.cpp is.
//
// A padded image and the gradients of its sample, turned to [positions, outputs], stay in the cache; a tile of some numbers
// of the patch times some vectors of outputs stays in registers while it runs over all positions.
#include "windows.h"

#include <type_traits>

#include "half.h"

namespace sui {
namespace {

#if defined(__AVX512F__)
constexpr int kTile = 24;  // vectors of a tile: what the registers leave beside one row of the other side
#else
constexpr int kTile = 12;
#endif

template <class T>
void zero(T* p, Index count) {
  for (Index j = 0; j < count; ++j) p[j] = 0;
}

template <class T>
Index image_size(const Windows<T>& w) {
  return w.planes * w.padded[0] * w.padded[1] * w.padded[2];
}

template <class T>
Index inner_size(const Windows<T>& w) {
  return w.planes * w.size[0] * w.size[1] * w.size[2];
}

// to = sign x, or += where it is not the first; count numbers that are `apart`.
template <class T, bool first, class E>
SUI_FN void copy_line(const E* from, Index apart, Index count, T sign, T* to) {
  constexpr int lanes = Simd<T>::lanes;
  Index q = 0;
  if (apart == 1)
    for (; q + lanes <= count; q += lanes) at(to + q) = (first ? Vector<T>{} : at(to + q)) + sign * load(from + q);
  if constexpr (sizeof(E) == sizeof(T)) {  // lines of small images are shorter than a vector
    typedef T Short __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
    constexpr int some = 16 / sizeof(T);
    if (apart == 1)
      for (; q + some <= count; q += some) {
        Short& here = *reinterpret_cast<Short*>(to + q);
        here = (first ? Short{} : here) + sign * *reinterpret_cast<const Short*>(from + q);
      }
  }
  for (; q < count; ++q) to[q] = (first ? T(0) : to[q]) + sign * one(from + q * apart);
}

// The inside of a padded image whose border is zero. Channels of dense images are added up before they are padded.
template <class T, class E>
void copy_image(const Windows<T>& w, const E* x, T* sums, T* to) {
  const Index plane = w.padded[0] * w.padded[1] * w.padded[2], count = inner_size(w) / w.planes;
  const Index inside = (w.before[0] * w.padded[1] + w.before[1]) * w.padded[2] + w.before[2];
  const auto pad = [&](const auto* from, const Index* stride, T sign, Index q, auto add) {
    for (Index z = 0; z < w.size[0]; ++z)
      for (Index y = 0; y < w.size[1]; ++y)
        copy_line<T, !add()>(from + z * stride[0] + y * stride[1], stride[2], w.size[2], sign,
                             to + q * plane + inside + (z * w.padded[1] + y) * w.padded[2]);
  };
  const Index dense[] = {w.size[1] * w.size[2], w.size[2], 1};
  bool together = w.channels > w.planes;
  for (int axis = 0; axis < 3; ++axis) together &= w.stride[axis] == dense[axis] || w.size[axis] == 1;
  for (Index c = 0, q = 0; c < w.channels; ++c, q = q + 1 == w.planes ? 0 : q + 1) {
    const E* const from = x + c * w.channel;
    const T sign = w.sign ? w.sign[c] : T(1);
    if (together && c < w.planes)
      copy_line<T, true>(from, 1, count, sign, sums + q * count);
    else if (together)
      copy_line<T, false>(from, 1, count, sign, sums + q * count);
    else if (c < w.planes)
      pad(from, w.stride, sign, q, std::false_type());
    else
      pad(from, w.stride, sign, q, std::true_type());
  }
  if (together)
    for (Index q = 0; q < w.planes; ++q) pad(sums + q * count, dense, T(1), q, std::false_type());
}

// g [o, s] to [s, width], with signs; output o is added to column o mod width.
template <class T, class E>
void turn(const E* g, Index o, Index s, const T* sign, Index width, T* to) {
  constexpr int lanes = Simd<T>::lanes;
  for (Index first = 0; first < width; first += lanes) {
    for (Index p = 0; p < s; p += lanes) {
      const int live = static_cast<int>(s - p < lanes ? s - p : lanes);
      Vector<T> total[lanes] = {};
      for (Index block = first; block < o || block == first; block += width) {
        Vector<T> v[lanes];
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) {
          v[l] = Vector<T>{};
          if (block + l >= o) continue;
          const E* from = g + (block + l) * s + p;
          if (live == lanes)
            v[l] = load(from);
          else
            for (int q = 0; q < live; ++q) v[l][q] = one(from + q);
          if (sign) v[l] *= sign[block + l];
        }
        transpose<T>(v);
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) total[l] += v[l];
      }
      for (int l = 0; l < live; ++l) at(to + (p + l) * width + first) = total[l];
    }
  }
}

template <class T, int J, int V>
struct Tile {
  Vector<T> at[J][V];
};

// tile[j][v] = sum_p x[base[p] + offset[j]] g[p, v]
template <class T, int J, int V>
SUI_FN void multiply(const T* x, const int* base, const int* offset, Index s, const T* g, Index width,
                     Tile<T, J, V>& tile) {
  constexpr int lanes = Simd<T>::lanes;
  Vector<T> sum[J][V] = {};
  for (Index p = 0; p < s; ++p) {
    const T* from = x + base[p];
    const T* row = g + p * width;
    Vector<T> right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = at(row + v * lanes);
#pragma GCC unroll 24
    for (int j = 0; j < J; ++j) {
      const T left = from[offset[j]];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[j][v] += left * right[v];
    }
  }
#pragma GCC unroll 24
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) tile.at[j][v] = sum[j][v];
}

// All tiles of V vectors of outputs from `column` on; take(j, v, vector).
template <class T, int J, int V, class Take>
void strip(const Windows<T>& w, Index j, const T* x, const T* g, Index width, Index column, const Take& take) {
  constexpr int lanes = Simd<T>::lanes;
  for (; j + J <= w.i; j += J) {
    Tile<T, J, V> tile;
    multiply<T, J, V>(x, w.base, w.offset + j, w.s, g + column, width, tile);
    for (int q = 0; q < J; ++q)
      for (int v = 0; v < V; ++v) take(j + q, column + v * lanes, tile.at[q][v]);
  }
  if constexpr (J > 1)
    if (j < w.i) strip<T, J / 2, V>(w, j, x, g, width, column, take);
}

template <class T, class Take>
void product(const Windows<T>& w, const T* x, const T* g, Index width, const Take& take) {
  constexpr int lanes = Simd<T>::lanes;
  Index column = 0;
  for (; column + 4 * lanes <= width; column += 4 * lanes) strip<T, kTile / 4, 4>(w, 0, x, g, width, column, take);
  for (; column + 2 * lanes <= width; column += 2 * lanes) strip<T, kTile / 2, 2>(w, 0, x, g, width, column, take);
  for (; column < width; column += lanes) strip<T, kTile, 1>(w, 0, x, g, width, column, take);
}

// room: an image with and without its border, gradients [s, width], a sketch with what goes beyond its end
template <class T>
Index room(const Windows<T>& w, Index width, Index rank) {
  return image_size(w) + inner_size(w) + w.s * width + rank + width;
}

// each(sample, output, image, gradients)
template <class T, class X, class G, class Each>
void samples_as(const Windows<T>& w, Index first, Index last, const T* sign, Index width, T* room, const Each& each) {
  T* const image = room;
  T* const sums = image + image_size(w);
  T* const g = sums + inner_size(w);
  zero(image, image_size(w));
  for (Index n = first; n < last; ++n) {
    copy_image(w, static_cast<const X*>(w.x) + n * w.sample, sums, image);
    for (Index c = 0; c < w.k; ++c) {
      turn(static_cast<const G*>(w.g) + (n * w.k + c) * w.o * w.s, w.o, w.s, sign, width, g);
      each(n, c, image, g);
    }
  }
}
template <class T, class Each>
void samples(const Windows<T>& w, Index first, Index last, const T* sign, Index width, T* room, const Each& each) {
  if constexpr (sizeof(T) == 4) {
    const bool x = w.kind_x == Kind::bfloat16, g = w.kind_g == Kind::bfloat16;
    if (x && g) return samples_as<T, Bfloat16, Bfloat16>(w, first, last, sign, width, room, each);
    if (x) return samples_as<T, Bfloat16, T>(w, first, last, sign, width, room, each);
    if (g) return samples_as<T, T, Bfloat16>(w, first, last, sign, width, room, each);
  }
  samples_as<T, T, T>(w, first, last, sign, width, room, each);
}

template <class T>
void rows(const Windows<T>& w, Index first, Index last, Index width, T* room, T* out) {
  samples<T>(w, first, last, nullptr, width, room, [&](Index n, Index c, const T* image, const T* g) {
    T* const to = out + ((n - first) * w.k + c) * w.i * width;
    product(w, image, g, width, [&](Index j, Index column, Vector<T> v) { at(to + j * width + column) = v; });
  });
}

template <class T>
void fold(const Windows<T>& w, const Folding<T>& f, Index first, Index last, T* room, T* out) {
  constexpr int lanes = Simd<T>::lanes;
  const Index width = f.width;
  T* const sums = room + image_size(w) + inner_size(w) + w.s * width;
  zero(sums, f.rank + width);
  samples<T>(w, first, last, f.sign_o, width, room, [&](Index n, Index c, const T* image, const T* g) {
    product(w, image, g, width, [&](Index j, Index column, Vector<T> v) {
      at(sums + f.place[j] + column) += v * f.sign_i[j];
    });
    if (f.ones)
      for (Index column = 0; column < width; column += lanes) {
        Vector<T> total = {};
        for (Index p = 0; p < w.s; ++p) total += at(g + p * width + column);
        at(sums + f.place[w.i] + column) += total * f.sign_i[w.i];
      }
    T* const to = out + (n * w.k + c) * f.rank;
    for (Index b = 0; b < f.rank; ++b) to[b] += sums[b];
    for (Index b = 0; b < width; ++b) to[b] += sums[f.rank + b];  // width <= rank
    zero(sums, f.rank + width);
  });
}

}  // namespace

#define SUI_TABLE(T)                                                   \
  extern const WindowKernels<T> SUI_JOIN(windows_##T##_, SUI_VARIANT); \
  const WindowKernels<T> SUI_JOIN(windows_##T##_, SUI_VARIANT) = {room<T>, rows<T>, fold<T>}
SUI_TABLE(float);
SUI_TABLE(double);

}  // namespace sui
