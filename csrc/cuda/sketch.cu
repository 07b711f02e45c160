// Sketches on the GPU. Numbers are read as they are stored (float64, float32, float16, bfloat16) and added in float64
// or float32.
//
//   tensor_fft       one block of threads for every (sample, output): for each position both count sketches are
//                    scattered into one complex array in shared memory (a real, g imaginary, bit-reversed places),
//                    transformed once, separated by symmetry and multiplied; a power of two u of every position makes
//                    u a and g / u equal in size, or the smaller would drown in the rounding of the larger. The products
//                    of all positions add up in registers, to those of earlier layers where there are any, and are
//                    kept for later ones or go back by one transform. rank is a power of two.
//   scatter_formed   a chunk of `group` formed rows is read, hashed once for all of them and added up in shared memory;
//                    the sums of the chunks meet by atomics.
//   scatter_factors  the same with entries formed on the way, as sums over positions of g a.
//
// Sizes are long long: the launcher passes 8 bytes for every number.
#include "sui/philox.h"

namespace sui {

struct Float16 {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

__device__ inline double wide(double x) { return x; }
__device__ inline float wide(float x) { return x; }
__device__ inline float wide(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float wide(Float16 x) {  // the exponent's bias by a product, exact for subnormals too
  const unsigned size = x.bits & 0x7fffu, sign = static_cast<unsigned>(x.bits & 0x8000u) << 16;
  if (size >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (size & 0x3ffu) << 13);
  const float value = __uint_as_float(size << 13) * 0x1p112f;
  return sign ? -value : value;
}

template <class Stored>
struct WideOf {
  using Type = float;
};
template <>
struct WideOf<double> {
  using Type = double;
};
template <class Stored>
using Wide = typename WideOf<Stored>::Type;

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T re, im;
};

// Hashes of the inputs and outputs of a layer; all null for the SJLT, whose entries are hashed on the way.
template <class T>
struct Tables {
  const int* place_a;
  const T* sign_a;
  const int* place_g;
  const T* sign_g;
};

// Tensor sketch by transforms ----------------------------------------------------------------------------------------

constexpr int kMostFrequencies = 9;  // of one thread: rank 4096 on 256 threads has 2049 / 256

__device__ inline unsigned reversed(unsigned x, int bits) { return bits ? __brev(x) >> (32 - bits) : 0; }

// Where entry x lies in shared memory: a gap after every eight, so that strides of powers of two meet different banks.
__device__ inline int slot(int x) { return x + (x >> 3); }

// S stages at once, 2^S points in registers; half: distance of the first stage's pairs.
template <int S, class T>
__device__ inline void stages(Pair<T>* x, int rank, int half, const Pair<T>* roots) {
  constexpr int points = 1 << S;
  __syncthreads();
  for (int b = threadIdx.x; b < rank >> S; b += blockDim.x) {
    const int j = b & (half - 1), base = ((b - j) << S) + j;
    Pair<T> v[points];
#pragma unroll
    for (int p = 0; p < points; ++p) v[p] = x[slot(base + p * half)];
    int stride = rank / 2 / half;
#pragma unroll
    for (int t = 0; t < S; ++t, stride /= 2) {
#pragma unroll
      for (int low = 0; low < 1 << t; ++low) {
        const Pair<T> root = roots[(j + low * half) * stride];
#pragma unroll
        for (int p = low; p < points; p += 2 << t) {
          const Pair<T> u = v[p], w = v[p + (1 << t)];
          const Pair<T> turned{w.re * root.re - w.im * root.im, w.re * root.im + w.im * root.re};
          v[p] = {u.re + turned.re, u.im + turned.im};
          v[p + (1 << t)] = {u.re - turned.re, u.im - turned.im};
        }
      }
    }
#pragma unroll
    for (int p = 0; p < points; ++p) x[slot(base + p * half)] = v[p];
  }
}

// In place, from bit-reversed to natural order; roots[j] = exp(-2 pi i j / rank), j < rank / 2.
template <class T>
__device__ inline void transform(Pair<T>* x, int rank, const Pair<T>* roots) {
  constexpr int S = sizeof(T) == 4 ? 3 : 2;  // what registers hold
  int half = 1;
  for (; half << S <= rank; half <<= S) stages<S>(x, rank, half, roots);
  if (rank / half == 4) stages<2>(x, rank, half, roots);
  if (rank / half == 2) stages<1>(x, rank, half, roots);
  __syncthreads();
}

// Places of the tables are slots of bit-reversed places. ones: one more input, 1 everywhere. u [rows, s], 0 where a or g
// is. sums [rows, rank / 2 + 1] of earlier layers or null; the new ones where out is null.
template <class Stored, class T = Wide<Stored>>
__device__ inline void tensor_fft(const Stored* a, const Stored* g, long long k, long long s, long long i, long long o,
                                  bool ones, int bits, const Tables<T>& tables, const T* u, const Pair<T>* roots,
                                  Pair<T>* sums, T* out, Pair<T>* x) {
  const int rank = 1 << bits;
  const long long row = blockIdx.x;  // (sample, output)
  const Stored *left = a + row / k * s * i, *right = g + row * s * o;
  T* numbers = reinterpret_cast<T*>(x);
  Pair<T>* const own = sums ? sums + row * (rank / 2 + 1) : nullptr;
  Pair<T> total[kMostFrequencies] = {};
#pragma unroll
  for (int c = 0; c < kMostFrequencies; ++c) {
    const int f = threadIdx.x + c * blockDim.x;
    if (own && f <= rank / 2) total[c] = own[f];
  }
  for (long long p = 0; p < s; ++p, left += i, right += o) {
    const T scale = u[row * s + p];
    if (scale == 0) continue;  // for all threads
    const T inverse = T(1) / scale;
    for (int b = threadIdx.x; b < 2 * (rank + rank / 8); b += blockDim.x) numbers[b] = 0;
    __syncthreads();
    for (long long j = threadIdx.x; j < i; j += blockDim.x)
      atomicAdd(numbers + 2 * tables.place_a[j], wide(left[j]) * scale * tables.sign_a[j]);
    if (ones && threadIdx.x == 0) atomicAdd(numbers + 2 * tables.place_a[i], scale * tables.sign_a[i]);
    for (long long j = threadIdx.x; j < o; j += blockDim.x)
      atomicAdd(numbers + 2 * tables.place_g[j] + 1, wide(right[j]) * inverse * tables.sign_g[j]);
    transform(x, rank, roots);
#pragma unroll
    for (int c = 0; c < kMostFrequencies; ++c) {  // a = (z + conj z') / 2, g = (z - conj z') / 2i, z' at -f
      const int f = threadIdx.x + c * blockDim.x;
      if (f > rank / 2) break;
      const Pair<T> z = x[slot(f)], mirror = x[slot((rank - f) & (rank - 1))];
      const Pair<T> v{(z.re + mirror.re) / 2, (z.im - mirror.im) / 2};
      const Pair<T> w{(z.im + mirror.im) / 2, (mirror.re - z.re) / 2};
      total[c].re += v.re * w.re - v.im * w.im;
      total[c].im += v.re * w.im + v.im * w.re;
    }
    __syncthreads();
  }
  if (!out) {
#pragma unroll
    for (int c = 0; c < kMostFrequencies; ++c) {
      const int f = threadIdx.x + c * blockDim.x;
      if (own && f <= rank / 2) own[f] = total[c];
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < kMostFrequencies; ++c) {  // conjugated, so that the same transform goes back
    const int f = threadIdx.x + c * blockDim.x;
    if (f > rank / 2) break;
    const int mirror = (rank - f) & (rank - 1);
    x[slot(reversed(f, bits))] = {total[c].re, -total[c].im};
    if (mirror != f) x[slot(reversed(mirror, bits))] = {total[c].re, total[c].im};
  }
  transform(x, rank, roots);
  for (int b = threadIdx.x; b < rank; b += blockDim.x) out[row * rank + b] = x[slot(b)].re / static_cast<T>(rank);
}

// Scattering ---------------------------------------------------------------------------------------------------------

constexpr int kRows = 4, kFour = 4;  // rows that share a hash at most, entries that share its counter

// Line and column of entry e of a row, a matrix with i columns; the short division where it will do.
__device__ inline void split(long long e, long long i, long long* line, long long* column) {
  if ((e | i) >> 32)
    *line = e / i;
  else
    *line = static_cast<unsigned>(e) / static_cast<unsigned>(i);
  *column = e - *line * i;
}

// Places and signs of entries begin .. begin + 4 of the given part of a row; place -1 outside 0 .. length.
template <class T>
__device__ inline void hash_four(long long begin, long long first, long long length, long long i,
                                 const Tables<T>& tables, unsigned stream, unsigned long long seed, int rank,
                                 int (&place)[kFour], T (&sign)[kFour]) {
  if (tables.place_a) {
    long long line, column;
    split(begin < 0 ? 0 : begin, i, &line, &column);
#pragma unroll
    for (int part = 0; part < kFour; ++part) {
      place[part] = -1;
      if (begin + part < 0 || begin + part >= length) continue;
      place[part] = tables.place_g[line] + tables.place_a[column];
      place[part] -= place[part] >= rank ? rank : 0;
      sign[part] = tables.sign_g[line] * tables.sign_a[column];
      if (++column == i) {
        column = 0;
        ++line;
      }
    }
  } else {
    const Philox words = philox(static_cast<unsigned long long>(first + begin) / kFour, 2, stream, seed);
#pragma unroll
    for (int part = 0; part < kFour; ++part) {
      const unsigned word = hash_word(words, part);
      place[part] = begin + part < 0 || begin + part >= length ? -1 : static_cast<int>(bucket(word, rank));
      sign[part] = word & 1u ? T(-1) : T(1);
    }
  }
}

// Rows blockIdx.x * group .. of the launch, entries by fours that begin at a multiple of four of the whole row, as the
// hash has them; `read(row, begin, value)` gives the four of one row, of which those outside 0 .. length do not matter.
template <class T, class Read>
__device__ inline void scatter(long long rows, long long i, long long length, long long first, const Tables<T>& tables,
                               unsigned stream, unsigned long long seed, int rank, int group, T* out, T* sums,
                               const Read& read) {
  const long long row0 = static_cast<long long>(blockIdx.x) * group;
  const int live = rows - row0 < group ? static_cast<int>(rows - row0) : group;
  for (int b = threadIdx.x; b < live * rank; b += blockDim.x) sums[b] = 0;
  __syncthreads();
  const long long skip = first % kFour, fours = (length + skip + kFour - 1) / kFour;
  const long long step = static_cast<long long>(gridDim.y) * blockDim.x;
  for (long long four = static_cast<long long>(blockIdx.y) * blockDim.x + threadIdx.x; four < fours; four += step) {
    const long long begin = four * kFour - skip;
    T value[kRows][kFour], sign[kFour];
    int place[kFour];
#pragma unroll
    for (int row = 0; row < kRows; ++row)  // all loads are under way before the first sum
      if (row < live) read(row0 + row, begin, value[row]);
    hash_four(begin, first, length, i, tables, stream, seed, rank, place, sign);
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int part = 0; part < kFour; ++part)
        if (row < live && place[part] >= 0) atomicAdd(sums + row * rank + place[part], value[row][part] * sign[part]);
  }
  __syncthreads();
  for (int b = threadIdx.x; b < live * rank; b += blockDim.x)
    if (sums[b] != T(0)) atomicAdd(out + row0 * rank + b, sums[b]);
}

// Formed rows [rows, length].
template <class Stored>
struct ReadFormed {
  const Stored* x;
  long long length;
  bool whole;  // every four is aligned and inside

  struct alignas(sizeof(Stored) == 8 ? 16 : 4 * sizeof(Stored)) Four {
    Stored part[kFour];
  };

  __device__ ReadFormed(const Stored* from, long long size, long long first)
      : x(from),
        length(size),
        whole((size | first) % kFour == 0 && reinterpret_cast<unsigned long long>(from) % alignof(Four) == 0) {}

  __device__ void operator()(long long row, long long begin, Wide<Stored> (&value)[kFour]) const {
    const Stored* at = x + row * length + begin;
    if (whole) {
      const Four four = *reinterpret_cast<const Four*>(at);
#pragma unroll
      for (int part = 0; part < kFour; ++part) value[part] = wide(four.part[part]);
    } else {
#pragma unroll
      for (int part = 0; part < kFour; ++part)
        value[part] = begin + part < 0 || begin + part >= length ? 0 : wide(at[part]);
    }
  }
};

// Entry (line, column) of row (n, c) is sum_s g[n, c, s, line] a[n, s, column].
template <class Stored>
struct ReadFactors {
  const Stored *a, *g;
  long long k, s, i, lines;

  __device__ void operator()(long long row, long long begin, Wide<Stored> (&value)[kFour]) const {
    long long line, column;
    split(begin, i, &line, &column);
    const Stored *left = a + row / k * s * i, *right = g + row * s * lines;
#pragma unroll
    for (int part = 0; part < kFour; ++part) {
      value[part] = 0;
      if (line < lines)
        for (long long p = 0; p < s; ++p) value[part] += wide(right[p * lines + line]) * wide(left[p * i + column]);
      if (++column == i) {
        column = 0;
        ++line;
      }
    }
  }
};

}  // namespace sui

#define SUI_KERNELS(Stored, T, NAME)                                                                                  \
  extern "C" __global__ void __launch_bounds__(256, 2) tensor_fft_##NAME(                                             \
      const Stored* a, const Stored* g, long long k, long long s, long long i, long long o, long long ones,           \
      long long bits, const int* place_a, const T* sign_a, const int* place_g, const T* sign_g, const T* u,           \
      const sui::Pair<T>* roots, sui::Pair<T>* sums, T* out) {                                                        \
    extern __shared__ double2 shared[];                                                                               \
    sui::tensor_fft(a, g, k, s, i, o, ones != 0, static_cast<int>(bits),                                              \
                    sui::Tables<T>{place_a, sign_a, place_g, sign_g}, u, roots, sums, out,                            \
                    reinterpret_cast<sui::Pair<T>*>(shared));                                                         \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 3) scatter_formed_##NAME(                                         \
      const Stored* x, long long rows, long long i, long long length, long long first, const int* place_a,            \
      const T* sign_a, const int* place_g, const T* sign_g, long long stream, unsigned long long seed,                \
      long long rank, long long group, T* out) {                                                                      \
    extern __shared__ double2 shared[];                                                                               \
    sui::scatter(rows, i, length, first, sui::Tables<T>{place_a, sign_a, place_g, sign_g},                            \
                 static_cast<unsigned>(stream), seed, static_cast<int>(rank), static_cast<int>(group), out,           \
                 reinterpret_cast<T*>(shared), sui::ReadFormed<Stored>(x, length, first));                            \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 2) scatter_factors_##NAME(                                        \
      const Stored* a, const Stored* g, long long rows, long long k, long long s, long long i, long long o,           \
      const int* place_a, const T* sign_a, const int* place_g, const T* sign_g, long long stream,                     \
      unsigned long long seed, long long rank, long long group, T* out) {                                             \
    extern __shared__ double2 shared[];                                                                               \
    sui::scatter(rows, i, o * i, 0, sui::Tables<T>{place_a, sign_a, place_g, sign_g}, static_cast<unsigned>(stream),  \
                 seed, static_cast<int>(rank), static_cast<int>(group), out, reinterpret_cast<T*>(shared),            \
                 sui::ReadFactors<Stored>{a, g, k, s, i, o});                                                         \
  }
SUI_KERNELS(float, float, float32)
SUI_KERNELS(double, double, float64)
SUI_KERNELS(sui::Float16, float, float16)
SUI_KERNELS(sui::BFloat16, float, bfloat16)
