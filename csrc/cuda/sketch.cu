// Sketches on the GPU. T is float or double: half precision is widened before.
//
//   tensor_fft    one block of threads for every (sample, output): for each position both count sketches are scattered
//                 into one complex array in shared memory (a real, g imaginary, bit-reversed places), transformed
//                 once, separated by symmetry and multiplied; the products of all positions add up in registers, and one
//                 transform goes back. rank is a power of two.
//   scatter_rows  a chunk of the row of kRows rows is formed entry by entry (sum over positions of g a) or read, hashed once
//                 and added up in shared memory; the sums of the chunks meet by atomics.
//
// Sizes are long long and numbers double: the launcher passes 8 bytes each.
#include "sui/philox.h"

namespace sui {

template <class T>
struct Pair {
  T re, im;
};

constexpr int kMostFrequencies = 10;  // of one thread: rank 4096 on 256 threads has 2049 / 256

__device__ inline unsigned reversed(unsigned x, int bits) { return bits ? __brev(x) >> (32 - bits) : 0; }

// In place, from bit-reversed to natural order; roots[j] = exp(-2 pi i j / rank), j < rank / 2.
template <class T>
__device__ void transform(Pair<T>* x, int rank, const Pair<T>* roots) {
  for (int half = 1, stride = rank / 2; half < rank; half *= 2, stride /= 2) {
    __syncthreads();
    for (int b = threadIdx.x; b < rank / 2; b += blockDim.x) {
      const int j = b % half, low = (b - j) * 2 + j, high = low + half;
      const Pair<T> root = roots[j * stride], u = x[low], v = x[high];
      const Pair<T> turned{v.re * root.re - v.im * root.im, v.re * root.im + v.im * root.re};
      x[low] = {u.re + turned.re, u.im + turned.im};
      x[high] = {u.re - turned.re, u.im - turned.im};
    }
  }
  __syncthreads();
}

// place_a, place_g: bit-reversed places; sign_a, sign_g: signs.
template <class T>
__device__ void tensor_fft(const T* a, const T* g, long long k, long long s, long long i, long long o, int bits,
                           const int* place_a, const T* sign_a, const int* place_g, const T* sign_g,
                           const Pair<T>* roots, T* out, Pair<T>* x) {
  const int rank = 1 << bits;
  const long long row = blockIdx.x;  // (sample, output)
  const T *left = a + row / k * s * i, *right = g + row * s * o;
  T* numbers = reinterpret_cast<T*>(x);
  Pair<T> total[kMostFrequencies] = {};
  for (long long p = 0; p < s; ++p, left += i, right += o) {
    for (int b = threadIdx.x; b < 2 * rank; b += blockDim.x) numbers[b] = 0;
    __syncthreads();
    for (long long j = threadIdx.x; j < i; j += blockDim.x) atomicAdd(numbers + 2 * place_a[j], left[j] * sign_a[j]);
    for (long long j = threadIdx.x; j < o; j += blockDim.x) atomicAdd(numbers + 2 * place_g[j] + 1, right[j] * sign_g[j]);
    transform(x, rank, roots);
#pragma unroll
    for (int c = 0; c < kMostFrequencies; ++c) {  // a = (z + conj z') / 2, g = (z - conj z') / 2i, z' at -f
      const int f = threadIdx.x + c * blockDim.x;
      if (f > rank / 2) break;
      const Pair<T> z = x[f], mirror = x[(rank - f) & (rank - 1)];
      const Pair<T> u{(z.re + mirror.re) / 2, (z.im - mirror.im) / 2}, v{(z.im + mirror.im) / 2, (mirror.re - z.re) / 2};
      total[c].re += u.re * v.re - u.im * v.im;
      total[c].im += u.re * v.im + u.im * v.re;
    }
    __syncthreads();
  }
#pragma unroll
  for (int c = 0; c < kMostFrequencies; ++c) {  // conjugated, so that the same transform goes back
    const int f = threadIdx.x + c * blockDim.x;
    if (f > rank / 2) break;
    const int mirror = (rank - f) & (rank - 1);
    x[reversed(f, bits)] = {total[c].re, -total[c].im};
    if (mirror != f) x[reversed(mirror, bits)] = {total[c].re, total[c].im};
  }
  transform(x, rank, roots);
  for (int b = threadIdx.x; b < rank; b += blockDim.x) out[row * rank + b] = x[b].re / static_cast<T>(rank);
}

constexpr int kRows = 4, kHashed = 4;  // rows that share a hash, entries that share its counter

// x: formed rows [rows, length] where g is null, else rows (n, c) are sum_s g[n, c, s, o] a[n, s, i], o x i = length.
// tables: places and signs of i and o (tensor sketch) or null (SJLT, hashed here); entries first .. first + length of the row.
template <class T>
__device__ void scatter_rows(const T* x, const T* g, long long rows, long long k, long long s, long long i, long long length,
                             long long first, const int* place_a, const T* sign_a, const int* place_g, const T* sign_g,
                             unsigned stream, unsigned long long seed, int rank, T* out, T* sums) {
  const long long row0 = static_cast<long long>(blockIdx.y) * kRows;
  const long long lines = length / i;
  const int live = rows - row0 < kRows ? static_cast<int>(rows - row0) : kRows;
  for (int b = threadIdx.x; b < live * rank; b += blockDim.x) sums[b] = 0;
  __syncthreads();
  // entries e = first + .. in fours that begin at a multiple of four, as the hash has them
  const long long skip = first % kHashed, fours = (length + skip + kHashed - 1) / kHashed;
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long four = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; four < fours; four += step) {
    Philox words{};
    if (!place_a) words = philox(static_cast<unsigned long long>(first / kHashed + four), 2, stream, seed);
    const long long begin = four * kHashed - skip;
    long long line = begin < 0 ? 0 : begin / i, column = begin < 0 ? begin : begin % i;
#pragma unroll 1
    for (int part = 0; part < kHashed; ++part, ++column) {
      const long long e = begin + part;
      if (e < 0 || e >= length) continue;
      if (column == i) {
        column = 0;
        ++line;
      }
      int place;
      T sign;
      if (place_a) {
        place = place_g[line] + place_a[column];
        place -= place >= rank ? rank : 0;
        sign = sign_g[line] * sign_a[column];
      } else {
        const unsigned word = hash_word(words, part);
        place = static_cast<int>(bucket(word, rank));
        sign = word & 1u ? T(-1) : T(1);
      }
      for (int row = 0; row < live; ++row) {
        T value = 0;
        if (g) {
          const T *right = g + (row0 + row) * s * lines + line, *left = x + (row0 + row) / k * s * i + column;
          for (long long p = 0; p < s; ++p) value += right[p * lines] * left[p * i];
        } else {
          value = x[(row0 + row) * length + e];
        }
        atomicAdd(sums + row * rank + place, value * sign);
      }
    }
  }
  __syncthreads();
  for (int b = threadIdx.x; b < live * rank; b += blockDim.x)
    if (sums[b] != T(0)) atomicAdd(out + row0 * rank + b, sums[b]);
}

}  // namespace sui

#define SUI_KERNELS(T, NAME)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 2) tensor_fft_##NAME(                                                 \
      const T* a, const T* g, long long k, long long s, long long i, long long o, long long bits, const int* place_a,  \
      const T* sign_a, const int* place_g, const T* sign_g, const sui::Pair<T>* roots, T* out) {                       \
    extern __shared__ double shared[];                                                                                 \
    sui::tensor_fft(a, g, k, s, i, o, static_cast<int>(bits), place_a, sign_a, place_g, sign_g, roots, out,            \
                    reinterpret_cast<sui::Pair<T>*>(shared));                                                          \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 2) scatter_rows_##NAME(                                               \
      const T* x, const T* g, long long rows, long long k, long long s, long long i, long long length, long long first, \
      const int* place_a, const T* sign_a, const int* place_g, const T* sign_g, long long stream,                      \
      unsigned long long seed, long long rank, T* out) {                                                               \
    extern __shared__ double shared[];                                                                                 \
    sui::scatter_rows(x, g, rows, k, s, i, length, first, place_a, sign_a, place_g, sign_g,                            \
                      static_cast<unsigned>(stream), seed, static_cast<int>(rank), out,                                \
                      reinterpret_cast<T*>(shared));                                                                   \
  }
SUI_KERNELS(float, float32)
SUI_KERNELS(double, float64)
