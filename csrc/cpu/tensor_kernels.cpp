// Tensor sketch (Pham and Pagh 2013), compiled once per instruction set as rows_kernels.cpp is.
//
// A vector holds one number of as many positions (or rows) as it has lanes, so hashing is one addition a feature, and
// pocketfft, whose plans take any type of number, transforms as many positions at once and shuffles nothing. Products of
// the transforms of both count sketches are summed over positions; one transform brings the sum back.
#include "tensor.h"

#include <memory>

#include "half.h"

#define POCKETFFT_NO_MULTITHREADING
#define pocketfft SUI_JOIN(pocketfft_, SUI_VARIANT)  // the linker must not share code between instruction sets
#include "pocketfft_hdronly.h"

namespace sui {
namespace {

// Count sketch --------------------------------------------------------------------------------------------------------

// to[place[j]] += sign[j] x[lane, j] for the live lanes.
template <class T, class E>
void hash_lanes(const E* const* from, int live, const Side<T>& side, T* to) {
  constexpr int lanes = Simd<T>::lanes;
  if (side.feature == 1) {
    Index j = 0;
    for (; j + lanes <= side.length; j += lanes) {
      Vector<T> v[lanes];
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) v[l] = l < live ? load(from[l] + j) : Vector<T>{};
      transpose<T>(v);
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) at(to + Index(side.place[j + l]) * lanes) += v[l] * side.sign[j + l];
    }
    for (; j < side.length; ++j) {
      Vector<T> v = {};
      for (int l = 0; l < live; ++l) v[l] = one(from[l] + j);
      at(to + Index(side.place[j]) * lanes) += v * side.sign[j];
    }
  } else {  // neighbouring lanes are neighbours in memory
    for (Index j = 0; j < side.length; ++j) {
      const E* p = from[0] + j * side.feature;
      Vector<T> v = {};
      if (live == lanes)
        v = load(p);
      else
        for (int l = 0; l < live; ++l) v[l] = one(p + l);
      at(to + Index(side.place[j]) * lanes) += v * side.sign[j];
    }
  }
  if (side.ones) at(to + Index(side.place[side.length]) * lanes) += side.sign[side.length];
}

// Positions begin .. begin + live of samples laid end to end, s a sample, of output c.
template <class T, class E>
void hash_as(const Side<T>& side, Index begin, int live, Index s, Index c, T* to) {
  const E* from[Simd<T>::lanes];
  for (int l = 0; l < live; ++l) {
    const Index n = (begin + l) / s, t = (begin + l) % s;
    from[l] = static_cast<const E*>(side.x) + n * side.sample + c * side.output + t * side.position;
  }
  hash_lanes<T, E>(from, live, side, to);
}
void hash(const Side<float>& side, Index begin, int live, Index s, Index c, float* to) {
  if (side.kind == Kind::bfloat16)
    hash_as<float, Bfloat16>(side, begin, live, s, c, to);
  else
    hash_as<float, float>(side, begin, live, s, c, to);
}
void hash(const Side<double>& side, Index begin, int live, Index s, Index c, double* to) {
  hash_as<double, double>(side, begin, live, s, c, to);
}

// Rows and lanes ------------------------------------------------------------------------------------------------------

template <class T>
void zero(T* p, Index count) {
  for (Index j = 0; j < count; j += Simd<T>::lanes) at(p + j) = Vector<T>{};
}

// v[j][lane] = rows[lane pitch + j] in the live lanes, 0 in the others.
template <class T>
SUI_FN void load_lanes(const T* rows, Index pitch, int live, Vector<T>* v) {
  constexpr int lanes = Simd<T>::lanes;
#pragma GCC unroll 16
  for (int l = 0; l < lanes; ++l) v[l] = l < live ? at(rows + l * pitch) : Vector<T>{};
  transpose<T>(v);
}

// to [count, lanes] = rows [live, count], zeros in the other lanes.
template <class T>
void gather(const T* rows, int live, Index count, T* to) {
  constexpr int lanes = Simd<T>::lanes;
  Index f = 0;
  for (; f + lanes <= count; f += lanes) {
    Vector<T> v[lanes];
    load_lanes(rows + f, count, live, v);
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) at(to + (f + l) * lanes) = v[l];
  }
  for (; f < count; ++f)
    for (int l = 0; l < lanes; ++l) to[f * lanes + l] = l < live ? rows[l * count + f] : T(0);
}

// row[lane] [count] += from [count, lanes], in the live lanes; from is ring after ring, row a place of each, the next of each.
template <class T>
void scatter(const T* from, int live, Index count, Index length, T* const* row) {
  constexpr int lanes = Simd<T>::lanes;
  Index f = 0, ring = 0, place = 0;
  const auto next = [&] {
    const T* const found = from + (ring + place) * lanes;
    if ((ring += length) == count) ring = 0, ++place;
    return found;
  };
  for (; f + lanes <= count; f += lanes) {
    Vector<T> v[lanes];
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) v[l] = at(next());
    transpose<T>(v);
    for (int l = 0; l < live; ++l) at(row[l] + f) += v[l];
  }
  for (; f < count; ++f) {
    const T* const found = next();
    for (int l = 0; l < live; ++l) row[l][f] += found[l];
  }
}

// row [count] += the sum over lanes of from [count, lanes].
template <class T>
void scatter_sum(const T* from, Index count, T* row) {
  constexpr int lanes = Simd<T>::lanes;
  Index f = 0;
  for (; f + lanes <= count; f += lanes) {
    Vector<T> v[lanes];
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) v[l] = at(from + (f + l) * lanes);
    transpose<T>(v);
#pragma GCC unroll 16
    for (int l = 1; l < lanes; ++l) v[0] += v[l];
    at(row + f) += v[0];
  }
  for (; f < count; ++f)
    for (int l = 0; l < lanes; ++l) row[f] += from[f * lanes + l];
}

// The numbers of a side, for each doubling of the rank, that are multiplied one by one sooner than transformed.
constexpr Index kShort = 2;

// Fourier -------------------------------------------------------------------------------------------------------------

namespace fft = pocketfft::detail;

template <class T>
struct Lanes {
  typedef T Type __attribute__((vector_size(kBytes)));
};
template <class T>
using Complex = fft::cmplx<typename Lanes<T>::Type>;

// Of an even number of real ones, taken in pairs as complex ones.
template <class T>
class Plan {
 public:
  explicit Plan(Index rank) : half_(rank / 2), plan_(half_), weight_(half_ / 2 + 1) {
    const fft::sincos_2pibyn<T> root(half_);
    for (Index f = 0; f <= half_ / 2; ++f) weight_[f].Set((T(1) + root[f].r) / 4, -root[f].i / 4);
  }
  Index rank() const { return 2 * half_; }

  void forward(T* x) const { plan_.exec(pairs(x), T(1), true); }
  void backward(T* x) const { plan_.exec(pairs(x), T(1) / static_cast<T>(half_), false); }

  // sums += the transform of the circular convolution of x and y, which are given by their transforms. Let E and O be
  // those of even and odd places, X = E + i O. With w_f = exp(-2 pi i f / half), which moves odd places of a product on,
  // E E' + w O O' + i (E O' + O E') = X X' + (1 + w) O O', and O_f = (X_f - conj X_-f) / 2 i.
  void add_product(const T* x, const T* y, T* sums) const {
    const Complex<T>*p = pairs(x), *q = pairs(y);
    Complex<T>* const s = pairs(sums);
    for (Index f = 0; f <= half_ / 2; ++f) {
      const Index r = f ? half_ - f : 0;
      const Complex<T> pf = p[f], pr = p[r], qf = q[f], qr = q[r];
      const Complex<T> odd = (pf - fft::conj(pr)) * (qf - fft::conj(qr)) * weight_[f];
      s[f] += pf * qf - odd;
      if (r != f) s[r] += pr * qr - fft::conj(odd);
    }
  }

 private:
  static Complex<T>* pairs(T* x) { return reinterpret_cast<Complex<T>*>(x); }
  static const Complex<T>* pairs(const T* x) { return reinterpret_cast<const Complex<T>*>(x); }

  Index half_;
  fft::cfftp<T> plan_;
  fft::arr<fft::cmplx<T>> weight_;
};

// The one that this thread used last, if it is for this rank.
template <class T>
const Plan<T>& plan_for(Index rank) {
  thread_local std::unique_ptr<const Plan<T>> plan;
  if (!plan || plan->rank() != rank) plan.reset(new Plan<T>(rank));
  return *plan;
}

// Three buffers [rank, lanes], apart by a little more: or all would meet in one set of the cache.
template <class T>
SUI_FN Index pitch(Index rank) {
  return (rank + 4) * Simd<T>::lanes;
}
template <class T>
Index fourier_room(Index rank) {
  return 3 * pitch<T>(rank);
}

template <class T>
void fourier_rows(const Layer<T>* layers, Index count, Index first, Index last, Index k, Index s, Index rank,
                  Index length, T* room, T* out) {
  constexpr int lanes = Simd<T>::lanes;
  const Plan<T>& plan = plan_for<T>(length);
  const Index size = rank * lanes, ring = length * lanes;
  T *x = room, *y = x + pitch<T>(rank), *sums = y + pitch<T>(rank);
  // where a sample fills the lanes, its groups end with it and its sums stay until then
  const bool together = s >= lanes;
  const Index end = last * s;
  for (Index begin = first * s; begin < end;) {
    const Index stop = together ? begin + s : begin + lanes < end ? begin + lanes : end;
    // one group of one layer: its transform of a serves all outputs
    const bool keep = count == 1 && stop - begin <= lanes;
    for (Index c = 0; c < k; ++c) {
      zero(sums, size);
      for (Index layer = 0; layer < count; ++layer) {
        const auto& [a, g, one] = layers[layer];
        const Index end_x = one == 1 ? ring : size, end_y = one == 2 ? ring : size;
        for (Index group = begin; group < stop; group += lanes) {
          const int live = static_cast<int>(stop - group < lanes ? stop - group : lanes);
          const bool fresh = c == 0 || !keep;
          if (fresh) {
            zero(x, end_x);
            hash(a, group, live, s, 0, x);
          }
          zero(y, end_y);
          hash(g, group, live, s, c, y);
          for (Index q = 0; q < size; q += ring) {
            if (q < end_x && fresh) plan.forward(x + q);
            if (q < end_y) plan.forward(y + q);
            plan.add_product(x + (q < end_x ? q : 0), y + (q < end_y ? q : 0), sums + q);
          }
        }
      }
      T* row[lanes];
      const int live = together ? 1 : static_cast<int>(stop - begin);
      for (int l = 0; l < live; ++l) row[l] = out + ((begin + l) / s * k + c) * rank;
      if (together)
        scatter_sum(sums, rank, row[0]);
      else
        scatter(sums, live, rank, rank, row);
    }
    begin = stop;
  }
}

template <class T>
void finish_rows(const T* sums, Index rows, Index rank, Index length, T* room, T* out) {
  constexpr int lanes = Simd<T>::lanes;
  const Plan<T>& plan = plan_for<T>(length);
  for (Index begin = 0; begin < rows; begin += lanes) {
    const int live = static_cast<int>(rows - begin < lanes ? rows - begin : lanes);
    gather(sums + begin * rank, live, rank, room);
    for (Index ring = 0; ring < rank; ring += length) plan.backward(room + ring * lanes);
    T* row[lanes];
    for (int l = 0; l < live; ++l) row[l] = out + (begin + l) * rank;
    scatter(room, live, rank, length, row);
  }
}

template <class T>
bool is_short(const Side<T>& side, Index rank) {
  return side.length + side.ones <= kShort * (31 - __builtin_clz(static_cast<unsigned>(rank)));
}

// sums [rank, lanes] += the circular convolution of y with x, whose numbers are at the places of its side; x is zero after.
template <class T>
void add_short(const Side<T>& side, T* x, const T* y, Index rank, T* sums) {
  constexpr int lanes = Simd<T>::lanes;
  for (Index j = 0; j < side.length + side.ones; ++j) {
    const Index place = side.place[j];
    const Vector<T> v = at(x + place * lanes);
    at(x + place * lanes) = Vector<T>{};  // another number at this place has been added to it
    T* const to = sums + place * lanes;
    for (Index b = 0; b < rank - place; ++b) at(to + b * lanes) += v * at(y + b * lanes);
    for (Index b = rank - place; b < rank; ++b) at(to + (b - rank) * lanes) += v * at(y + b * lanes);
  }
}

// As fourier_rows and finish_rows for layers of one position and one output: sums never leave their lanes.
template <class T>
void flat_rows(const Layer<T>* layers, Index count, Index first, Index last, Index rank, Index length, T* room,
               T* out) {
  constexpr int lanes = Simd<T>::lanes;
  const Plan<T>& plan = plan_for<T>(length);
  T *x = room, *y = x + pitch<T>(length), *sums = y + pitch<T>(length);
  for (Index begin = first; begin < last; begin += lanes) {
    const int live = static_cast<int>(last - begin < lanes ? last - begin : lanes);
    zero(sums, length * lanes);
    bool transformed = false;
    for (Index layer = 0; layer < count; ++layer) {
      const auto& [a, g, one] = layers[layer];
      if (is_short(a, rank) || is_short(g, rank)) continue;
      zero(x, length * lanes);
      hash(a, begin, live, 1, 0, x);
      plan.forward(x);
      zero(y, length * lanes);
      hash(g, begin, live, 1, 0, y);
      plan.forward(y);
      plan.add_product(x, y, sums);
      transformed = true;
    }
    if (transformed) {
      plan.backward(sums);
      for (Index b = rank; b < length && b < 2 * rank; ++b) at(sums + (b - rank) * lanes) += at(sums + b * lanes);
    }
    for (Index layer = 0; layer < count; ++layer) {
      const auto& [a, g, one] = layers[layer];
      if (!is_short(a, rank) && !is_short(g, rank)) continue;
      zero(x, rank * lanes);
      hash(a, begin, live, 1, 0, x);
      zero(y, rank * lanes);
      hash(g, begin, live, 1, 0, y);
      if (g.length < a.length)
        add_short(g, y, x, rank, sums);
      else
        add_short(a, x, y, rank, sums);
    }
    T* row[lanes];
    for (int l = 0; l < live; ++l) row[l] = out + (begin + l) * rank;
    scatter(sums, live, rank, rank, row);
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
        load_lanes(from + j, pitch, live, v);
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
      Simd<T>::lanes, fourier_room<T>, fourier_rows<T>, finish_rows<T>, flat_rows<T>, keep_rows<T>, \
      scatter_lanes<T>, scatter_index<T>}
SUI_TABLE(float);
SUI_TABLE(double);

}  // namespace sui
