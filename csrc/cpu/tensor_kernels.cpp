// Tensor sketch (Pham and Pagh 2013), compiled once per instruction set as rows_kernels.cpp is.
//
// A vector holds one number of as many positions (or rows) as it has lanes, so hashing is one addition a feature and no
// step of the transform shuffles. Both count sketches go through one complex transform z = u a + i g / u: with Z its
// result, Z_f^2 - conj(Z_-f)^2 = 4 i A_f G_f, and that is linear in Z^2, which is summed over positions. The power of two
// u brings a and g to one size, or the smaller would drown in the rounding of the larger.
#include "tensor.h"

#include "half.h"

namespace sui {
namespace {

template <class T>
SUI_FN Vector<T> magnitude(Vector<T> x) {
  return x < 0 ? -x : x;
}

// Count sketch --------------------------------------------------------------------------------------------------------

// Sum and largest of |x|. Their geometric mean is near the norm, which is the size of a transform, and no square of a
// small or large number is formed.
template <class T>
struct Size {
  Vector<T> sum, most;
};
template <class T>
SUI_FN void measure(Vector<T> x, Size<T>& size) {
  const Vector<T> here = magnitude<T>(x);
  size.sum += here;
  size.most = here > size.most ? here : size.most;
}

// to[place[j]] += sign[j] x[lane, j] for the live lanes.
template <class T, class E>
Size<T> hash_lanes(const E* const* from, int live, Index feature, const Side<T>& side, T* to) {
  constexpr int lanes = Simd<T>::lanes;
  Size<T> size{};
  if (feature == 1) {
    Index j = 0;
    for (; j + lanes <= side.length; j += lanes) {
      Vector<T> v[lanes];
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) v[l] = l < live ? load(from[l] + j) : Vector<T>{};
      transpose<T>(v);
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) {
        measure<T>(v[l], size);
        at(to + Index(side.place[j + l]) * lanes) += v[l] * side.sign[j + l];
      }
    }
    for (; j < side.length; ++j) {
      Vector<T> v = {};
      for (int l = 0; l < live; ++l) v[l] = one(from[l] + j);
      measure<T>(v, size);
      at(to + Index(side.place[j]) * lanes) += v * side.sign[j];
    }
  } else {  // neighbouring lanes are neighbours in memory
    for (Index j = 0; j < side.length; ++j) {
      const E* p = from[0] + j * feature;
      Vector<T> v = {};
      if (live == lanes)
        v = load(p);
      else
        for (int l = 0; l < live; ++l) v[l] = one(p + l);
      measure<T>(v, size);
      at(to + Index(side.place[j]) * lanes) += v * side.sign[j];
    }
  }
  if (side.ones) {
    Vector<T> v = {};
    for (int l = 0; l < live; ++l) v[l] = 1;
    measure<T>(v, size);
    at(to + Index(side.place[side.length]) * lanes) += v * side.sign[side.length];
  }
  return size;
}

template <class T>
struct Exponent;
template <>
struct Exponent<float> {
  using Bits = unsigned;
  static constexpr int shift = 23, bias = 127, most = 100;
};
template <>
struct Exponent<double> {
  using Bits = unsigned long long;
  static constexpr int shift = 52, bias = 1023, most = 1000;
};

template <class T>
SUI_FN int exponent(T x) {
  typename Exponent<T>::Bits bits;
  __builtin_memcpy(&bits, &x, sizeof(T));
  return static_cast<int>(bits >> Exponent<T>::shift) - Exponent<T>::bias;
}
template <class T>
SUI_FN T power_of_two(int e) {
  const auto bits = static_cast<typename Exponent<T>::Bits>(e + Exponent<T>::bias) << Exponent<T>::shift;
  T x;
  __builtin_memcpy(&x, &bits, sizeof(T));
  return x;
}

// Positions begin .. begin + live of samples laid end to end, s a sample, of output c; returns their sizes, powers of two.
template <class T, class E>
Vector<T> hash_as(const Side<T>& side, Index begin, int live, Index s, Index c, T* to) {
  const E* from[Simd<T>::lanes];
  for (int l = 0; l < live; ++l) {
    const Index n = (begin + l) / s, t = (begin + l) % s;
    from[l] = static_cast<const E*>(side.x) + n * side.sample + c * side.output + t * side.position;
  }
  const Size<T> found = hash_lanes<T, E>(from, live, side.feature, side, to);
  Vector<T> size = {};
  for (int l = 0; l < live; ++l) {
    int e = (exponent<T>(found.sum[l]) + exponent<T>(found.most[l])) / 2;
    e = e > -Exponent<T>::bias ? e : 1 - Exponent<T>::bias;  // subnormal numbers are no zeros
    if (found.sum[l] != 0) size[l] = power_of_two<T>(e < Exponent<T>::bias ? e : Exponent<T>::bias);
  }
  return size;
}

template <class T>
Vector<T> hash(const Side<T>& side, Index begin, int live, Index s, Index c, T* to);
template <>
Vector<float> hash(const Side<float>& side, Index begin, int live, Index s, Index c, float* to) {
  return side.kind == Kind::bfloat16 ? hash_as<float, Bfloat16>(side, begin, live, s, c, to)
                                     : hash_as<float, float>(side, begin, live, s, c, to);
}
template <>
Vector<double> hash(const Side<double>& side, Index begin, int live, Index s, Index c, double* to) {
  return hash_as<double, double>(side, begin, live, s, c, to);
}

// u and 1 / u, so that u a and g / u are about equal in size; zeros where the product is zero.
template <class T>
SUI_FN void balance(Vector<T> a, Vector<T> g, Vector<T>& u, Vector<T>& inverse) {
  for (int l = 0; l < Simd<T>::lanes; ++l) {
    const bool zero = a[l] == 0 || g[l] == 0;
    int e = (exponent<T>(g[l]) - exponent<T>(a[l])) / 2;
    e = e < -Exponent<T>::most ? -Exponent<T>::most : e > Exponent<T>::most ? Exponent<T>::most : e;
    u[l] = zero ? T(0) : power_of_two<T>(e);
    inverse[l] = zero ? T(0) : power_of_two<T>(-e);
  }
}

// Transform -----------------------------------------------------------------------------------------------------------

template <class T>
struct Plan {
  Index rank;
  const T *cos, *sin;  // of -2 pi j / rank
};

template <class T>
struct Pair {
  Vector<T> re, im;
};
template <class T>
SUI_FN Pair<T> turned(Vector<T> re, Vector<T> im, T c, T s) {
  return {re * c - im * s, re * s + im * c};
}

// The first stage where rank is an odd power of two; u, inverse as in `balance`.
template <class T>
void halve(T* re, T* im, Vector<T> u, Vector<T> inverse, const Plan<T>& plan) {
  constexpr int lanes = Simd<T>::lanes;
  const Index half = plan.rank / 2, gap = half * lanes;
  for (Index j = 0; j < half; ++j, re += lanes, im += lanes) {
    const Vector<T> ar = at(re) * u, ai = at(im) * inverse, br = at(re + gap) * u, bi = at(im + gap) * inverse;
    const Pair<T> odd = turned<T>(ar - br, ai - bi, plan.cos[j], plan.sin[j]);
    at(re) = ar + br;
    at(im) = ai + bi;
    at(re + gap) = odd.re;
    at(im + gap) = odd.im;
  }
}

template <class T>
SUI_FN void butterfly(const T* re, const T* im, Index gap, Pair<T>* y) {
  const Vector<T> ar = at(re), br = at(re + gap), cr = at(re + 2 * gap), dr = at(re + 3 * gap);
  const Vector<T> ai = at(im), bi = at(im + gap), ci = at(im + 2 * gap), di = at(im + 3 * gap);
  const Vector<T> pr = ar + cr, pi = ai + ci, qr = ar - cr, qi = ai - ci;
  const Vector<T> sr = br + dr, si = bi + di, tr = bi - di, ti = dr - br;  // t = -i (b - d)
  y[0] = {pr + sr, pi + si};
  y[1] = {qr + tr, qi + ti};
  y[2] = {pr - sr, pi - si};
  y[3] = {qr - tr, qi - ti};
}

// One stage of radix 4 on a block of n, decimation in frequency: frequencies 4 f + m are left in the m-th quarter.
template <class T, bool scaled>
void quarter(T* re, T* im, Index n, Vector<T> u, Vector<T> inverse, const Plan<T>& plan) {
  constexpr int lanes = Simd<T>::lanes;
  const Index gap = n / 4 * lanes, step = plan.rank / n;
  for (Index j = 0; j < n / 4; ++j, re += lanes, im += lanes) {
    if (scaled) {
      for (int m = 0; m < 4; ++m) at(re + m * gap) *= u, at(im + m * gap) *= inverse;
    }
    Pair<T> y[4];
    butterfly<T>(re, im, gap, y);
    at(re) = y[0].re;
    at(im) = y[0].im;
#pragma GCC unroll 4
    for (Index m = 1; m < 4; ++m) {
      const Pair<T> z = turned<T>(y[m].re, y[m].im, plan.cos[m * j * step], plan.sin[m * j * step]);
      at(re + m * gap) = z.re;
      at(im + m * gap) = z.im;
    }
  }
}

// The stages on a block of n, depth first, so that small blocks stay in the first cache. The last one's results, or their
// squares, are added to `sums`, n complex numbers a lane.
template <class T, bool squared>
void descend(T* re, T* im, Index n, const Plan<T>& plan, T* sums_re, T* sums_im) {
  constexpr int lanes = Simd<T>::lanes;
  const Index part = n / 4 * lanes;
  if (n == 4) {
    Pair<T> y[4];
    butterfly<T>(re, im, lanes, y);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      at(sums_re + m * lanes) += squared ? y[m].re * y[m].re - y[m].im * y[m].im : y[m].re;
      at(sums_im + m * lanes) += squared ? 2 * y[m].re * y[m].im : y[m].im;
    }
    return;
  }
  quarter<T, false>(re, im, n, Vector<T>{}, Vector<T>{}, plan);
  for (Index m = 0; m < 4; ++m)
    descend<T, squared>(re + m * part, im + m * part, n / 4, plan, sums_re + m * part, sums_im + m * part);
}

template <class T, bool squared>
void transform(T* re, T* im, Vector<T> u, Vector<T> inverse, const Plan<T>& plan, T* sums_re, T* sums_im) {
  constexpr int lanes = Simd<T>::lanes;
  const bool odd = __builtin_ctzll(static_cast<unsigned long long>(plan.rank)) & 1;
  const Index parts = odd ? 2 : 4, size = plan.rank / parts;
  if (odd)
    halve(re, im, u, inverse, plan);
  else
    quarter<T, true>(re, im, plan.rank, u, inverse, plan);
  for (Index m = 0; m < parts; ++m) {
    const Index at = m * size * lanes;
    descend<T, squared>(re + at, im + at, size, plan, sums_re + at, sums_im + at);
  }
}

// The frequency that ends at each place.
void order_block(Index n, int stride, int first, int* frequency) {
  if (n == 1) {
    *frequency = first;
    return;
  }
  const Index parts = __builtin_ctzll(static_cast<unsigned long long>(n)) & 1 ? 2 : 4;
  for (Index m = 0; m < parts; ++m)
    order_block(n / parts, stride * static_cast<int>(parts), first + static_cast<int>(m) * stride,
                frequency + m * (n / parts));
}
void order(Index rank, int* frequency) { order_block(rank, 1, 0, frequency); }

// Lanes of `sums` [count, lanes] to the rows of out they belong to, which begin `row[lane]`; sums are zero afterwards.
template <class T>
void flush(T* sums, Index count, T* const* row, int live, bool together) {
  constexpr int lanes = Simd<T>::lanes;
  for (Index f = 0; f < count; f += lanes) {
    Vector<T> v[lanes];
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) {
      v[l] = at(sums + (f + l) * lanes);
      at(sums + (f + l) * lanes) = Vector<T>{};
    }
    transpose<T>(v);
    if (together) {
      Vector<T> total = v[0];
#pragma GCC unroll 16
      for (int l = 1; l < lanes; ++l) total += v[l];
      at(row[0] + f) += total;
    } else {
      for (int l = 0; l < live; ++l) at(row[l] + f) += v[l];
    }
  }
}

template <class T>
void zero(T* p, Index count) {
  for (Index j = 0; j < count; j += Simd<T>::lanes) at(p + j) = Vector<T>{};
}

// Five buffers [rank, lanes], apart by a little more: all stages would meet in one set of the cache.
template <class T>
SUI_FN Index pitch(Index rank) {
  return (rank + 4) * Simd<T>::lanes;
}
template <class T>
Index fourier_room(Index rank) {
  return 5 * pitch<T>(rank) + Simd<T>::lanes;
}

template <class T>
void fourier_rows(const Layer<T>* layers, Index count, Index first, Index last, Index k, Index s, Index rank,
                  const T* roots, T* room, T* out) {
  constexpr int lanes = Simd<T>::lanes;
  const Plan<T> plan{rank, roots, roots + rank};
  const Index size = rank * lanes, next = pitch<T>(rank);
  T *re = room, *im = re + next, *kept = im + next, *sums_re = kept + next, *sums_im = sums_re + next;
  T* const size_kept = sums_im + next;
  zero(sums_re, size);
  zero(sums_im, size);
  // where a sample fills the lanes, its groups end with it and its sums stay until then
  const bool together = s >= lanes;
  const Index end = last * s;
  for (Index begin = first * s; begin < end;) {
    const Index stop = together ? begin + s : begin + lanes < end ? begin + lanes : end;
    for (Index c = 0; c < k; ++c) {
      // with several outputs the sketch of a is kept, group by group, only where there is one group of one layer
      const bool keep = k > 1 && count == 1 && stop - begin <= lanes;
      for (Index layer = 0; layer < count; ++layer) {
        const auto& [a, g] = layers[layer];
        for (Index group = begin; group < stop; group += lanes) {
          const int live = static_cast<int>(stop - group < lanes ? stop - group : lanes);
          Vector<T> size_a, u, inverse;
          if (!keep || c == 0) {
            zero(keep ? kept : re, size);
            size_a = hash(a, group, live, s, 0, keep ? kept : re);
            if (keep) at(size_kept) = size_a;
          }
          if (keep) {
            size_a = at(size_kept);
            for (Index j = 0; j < size; j += lanes) at(re + j) = at(kept + j);
          }
          zero(im, size);
          balance<T>(size_a, hash(g, group, live, s, c, im), u, inverse);
          transform<T, true>(re, im, u, inverse, plan, sums_re, sums_im);
        }
      }
      T* row[lanes];
      const int live = together ? 1 : static_cast<int>(stop - begin);
      for (int l = 0; l < live; ++l) row[l] = out + ((begin + l) / s * k + c) * 2 * rank;
      flush(sums_re, rank, row, live, together);
      for (int l = 0; l < live; ++l) row[l] += rank;
      flush(sums_im, rank, row, live, together);
    }
    begin = stop;
  }
}

// The sketch from its sums ----------------------------------------------------------------------------------------------

template <class T>
Index finish_room(Index rank) {
  return 6 * pitch<T>(rank);
}

// Rows of sums [live, 2, rank] as re, im [rank, lanes].
template <class T>
void gather(const T* sums, int live, Index rank, T* re, T* im) {
  constexpr int lanes = Simd<T>::lanes;
  for (Index p = 0; p < 2 * rank; p += lanes) {
    T* const to = p < rank ? re + p * lanes : im + (p - rank) * lanes;
    Vector<T> v[lanes];
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) v[l] = l < live ? at(sums + l * 2 * rank + p) : Vector<T>{};
    transpose<T>(v);
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) at(to + l * lanes) = v[l];
  }
}

// Buffers [rank, lanes]: those of a transform, and the sums of two groups of lanes.
template <class T>
struct Groups {
  Groups(T* room, Index rank) : re(room), im(re + pitch<T>(rank)) {
    for (int part = 0; part < 4; ++part) sums[part / 2][part % 2] = im + (part + 1) * pitch<T>(rank);
  }
  T *re, *im, *sums[2][2];
};

// The transform X of a sketch is X_f = (S_f - conj S_-f) / 4 i, and the sketch is fft(conj X) / rank, which is real: the
// rows of two groups are the real and the imaginary part of one transform. Adds `live` rows to out.
template <class T>
void finish_groups(const Groups<T>& room, Index live, const Plan<T>& plan, const int* place, T* out) {
  constexpr int lanes = Simd<T>::lanes;
  const Index rank = plan.rank;
  const auto& [first, second] = room.sums;
  for (Index f = 0; f < rank; ++f) {
    const Index here = Index(place[f]) * lanes, there = Index(place[(rank - f) % rank]) * lanes, to = f * lanes;
    at(room.re + to) = at(first[1] + here) + at(first[1] + there) - at(second[0] + here) + at(second[0] + there);
    at(room.im + to) = at(first[0] + here) - at(first[0] + there) + at(second[1] + here) + at(second[1] + there);
  }
  zero(first[0], rank * lanes);
  zero(first[1], rank * lanes);
  const Vector<T> scale = Vector<T>{} + T(0.25) / static_cast<T>(rank);
  transform<T, false>(room.re, room.im, scale, scale, plan, first[0], first[1]);
  for (int group = 0; group < 2; ++group, out += lanes * rank, live -= lanes) {
    for (Index b = 0; b < rank && live > 0; b += lanes) {
      Vector<T> v[lanes];
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) v[l] = at(first[group] + Index(place[b + l]) * lanes);
      transpose<T>(v);
      for (int l = 0; l < lanes && l < live; ++l) at(out + l * rank + b) += v[l];
    }
  }
}

template <class T>
void finish_rows(const T* sums, Index rows, Index rank, const T* roots, const int* place, T* memory, T* out) {
  constexpr Index lanes = Simd<T>::lanes;
  const Groups<T> room(memory, rank);
  for (Index begin = 0; begin < rows; begin += 2 * lanes) {
    const Index live = rows - begin < 2 * lanes ? rows - begin : 2 * lanes, one = live < lanes ? live : lanes;
    gather(sums + begin * 2 * rank, static_cast<int>(one), rank, room.sums[0][0], room.sums[0][1]);
    gather(sums + (begin + one) * 2 * rank, static_cast<int>(live - one), rank, room.sums[1][0], room.sums[1][1]);
    finish_groups(room, live, {rank, roots, roots + rank}, place, out + begin * rank);
  }
}

// fourier and finish for one position and one output: the sums stay as the transform leaves them.
template <class T>
void flat_rows(const Layer<T>* layers, Index count, Index first, Index last, Index rank, const T* roots,
               const int* place, T* memory, T* out) {
  constexpr Index lanes = Simd<T>::lanes;
  const Plan<T> plan{rank, roots, roots + rank};
  const Groups<T> room(memory, rank);
  for (Index begin = first; begin < last; begin += 2 * lanes) {
    for (int group = 0; group < 2; ++group) {
      const Index start = begin + group * lanes, live = last - start < lanes ? last - start : lanes;
      T* const* sums = room.sums[group];
      zero(sums[0], rank * lanes);
      zero(sums[1], rank * lanes);
      for (Index layer = 0; layer < count && live > 0; ++layer) {
        zero(room.re, rank * lanes);
        zero(room.im, rank * lanes);
        const Vector<T> size = hash(layers[layer].a, start, static_cast<int>(live), 1, 0, room.re);
        Vector<T> u, inverse;
        balance<T>(size, hash(layers[layer].g, start, static_cast<int>(live), 1, 0, room.im), u, inverse);
        transform<T, true>(room.re, room.im, u, inverse, plan, sums[0], sums[1]);
      }
    }
    finish_groups(room, last - begin, plan, place, out + begin * rank);
  }
}

template <class T>
bool keep_rows(const T* rows, Index count, Index rank, T factor, const Index* to, T* table) {
  constexpr Index lanes = Simd<T>::lanes;
  Vector<T> some = {};  // 0 x is 0 only where x is finite
  T bad = 0;
  Index j = 0;
  for (; j + lanes <= count * rank; j += lanes) some += T(0) * (factor * at(rows + j));
  for (; j < count * rank; ++j) bad += T(0) * (factor * rows[j]);
  for (Index l = 0; l < lanes; ++l) bad += some[l];
  if (bad != 0) return false;
  for (Index n = 0; n < count; ++n)
    for (j = 0; j < rank; ++j) table[to[n] * rank + j] = factor * rows[n * rank + j];
  return true;
}

// Scatter -------------------------------------------------------------------------------------------------------------

template <class T>
void scatter_lanes(const T* x, Index rows, Index o, Index i, const int* place_o, const T* sign_o, const int* place_i,
                   const T* sign_i, Index rank, T* room, T* out) {
  constexpr int lanes = Simd<T>::lanes;
  const Index pitch = o * i;
  for (Index first = 0; first < rows; first += lanes) {
    const int live = static_cast<int>(rows - first < lanes ? rows - first : lanes);
    zero(room, 2 * rank * lanes);
    for (Index q = 0; q < o; ++q) {
      const T* from = x + first * pitch + q * i;
      T* to = room + Index(place_o[q]) * lanes;
      const T sign = sign_o[q];
      Index j = 0;
      for (; j + lanes <= i; j += lanes) {
        Vector<T> v[lanes];
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) v[l] = l < live ? at(from + l * pitch + j) : Vector<T>{};
        transpose<T>(v);
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) at(to + Index(place_i[j + l]) * lanes) += v[l] * (sign * sign_i[j + l]);
      }
      for (; j < i; ++j) {
        Vector<T> v = {};
        for (int l = 0; l < live; ++l) v[l] = from[l * pitch + j];
        at(to + Index(place_i[j]) * lanes) += v * (sign * sign_i[j]);
      }
    }
    Index b = 0;  // the sum of two places is below 2 rank
    for (; b + lanes <= rank; b += lanes) {
      Vector<T> v[lanes];
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) v[l] = at(room + (b + l) * lanes) + at(room + (b + l + rank) * lanes);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l)
        if (l < live) at(out + (first + l) * rank + b) += v[l];
    }
    for (; b < rank; ++b) {
      const Vector<T> v = at(room + b * lanes) + at(room + (b + rank) * lanes);
      for (int l = 0; l < live; ++l) out[(first + l) * rank + b] += v[l];
    }
  }
}

// One-hot rows: their sketch is that of g, shifted to the place of the token.
template <class T>
void scatter_index(const T* g, Index samples, Index k, Index s, Index o, const Index* token, const int* place_token,
                   const T* sign_token, const int* place, const T* sign, Index rank, T* room, T* out) {
  for (Index n = 0; n < samples; ++n, token += s) {
    for (Index c = 0; c < k; ++c, out += rank) {
      for (Index b = 0; b < 2 * rank; ++b) room[b] = 0;
      for (Index p = 0; p < s; ++p, g += o) {
        if (token[p] < 0) continue;
        T* to = room + place_token[token[p]];
        const T factor = sign_token[token[p]];
        for (Index q = 0; q < o; ++q) to[place[q]] += factor * sign[q] * g[q];
      }
      for (Index b = 0; b < rank; ++b) out[b] += room[b] + room[b + rank];
    }
  }
}

}  // namespace

#define SUI_TABLE(T)                                                      \
  extern const TensorKernels<T> SUI_JOIN(tensor_##T##_, SUI_VARIANT);     \
  const TensorKernels<T> SUI_JOIN(tensor_##T##_, SUI_VARIANT) = {         \
      Simd<T>::lanes, order, fourier_room<T>, fourier_rows<T>, finish_room<T>, finish_rows<T>, flat_rows<T>, keep_rows<T>, \
      scatter_lanes<T>, scatter_index<T>}
SUI_TABLE(float);
SUI_TABLE(double);

}  // namespace sui
