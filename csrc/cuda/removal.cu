// Block leave-one-out on the GPU: one block of threads for every removed block of m <= 32 rows; arithmetic of
// sui/resolvent.h.
//
//   moments   threads stride over r; tiles of products and poles are reduced across the block
//   solve     one thread per pole, the m x m systems in shared memory
//   coef      threads stride over r again; u comes from the second cache
//
// As many poles at a time as shared memory holds. Sizes are long long and numbers double: the launcher passes 8 bytes
// each.
#include "sui/resolvent.h"

namespace sui {

constexpr int kWarp = 32, kPoles = 4;  // poles that share a read of u on the way back

// Sums over a warp of N values (a power of two) by exchanging halves: about N exchanges where one sum after the other
// takes 5 N. Lane l ends with value l N / 32, in v[0].
template <int N, int Offset = kWarp / 2>
__device__ inline void warp_sums(double* v) {
  if constexpr (N > 1) {
    const bool upper = threadIdx.x & Offset;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const double sent = upper ? v[i] : v[i + N / 2], kept = upper ? v[i + N / 2] : v[i];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, Offset);
    }
    warp_sums<N / 2, Offset / 2>(v);
  } else if constexpr (Offset > 0) {
    v[0] += __shfl_xor_sync(0xffffffffu, v[0], Offset);
    warp_sums<1, Offset / 2>(v);
  }
}

// Moments of all features against `columns` rows of the table, [features(m), columns]: TB products of rows (b = m is
// that with g) against TC columns in one pass over r. room: 2 TB TC doubles for every warp, halves in turn, so that one
// barrier a pass will do.
template <int TB, int TC, class Float>
__device__ inline void add_moments(const Float* u, int m, long long r, const double* g, const double* table,
                                   int columns, double* room, double* moments) {
  constexpr int N = TB * TC;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int turn = 0;
  for (int a = 0; a < m; ++a) {
    for (int b0 = a; b0 <= m; b0 += TB) {
      for (int c0 = 0; c0 < columns; c0 += TC, turn ^= 1) {
        double mine[N] = {};
        for (long long l = threadIdx.x; l < r; l += blockDim.x) {
          const double x = static_cast<double>(u[a * r + l]);
          double w[TC];
#pragma unroll
          for (int c = 0; c < TC; ++c) w[c] = c0 + c < columns ? table[(c0 + c) * r + l] : 0;
#pragma unroll
          for (int b = 0; b < TB; ++b) {
            if (b0 + b > m) continue;
            const double y = x * (b0 + b < m ? static_cast<double>(u[(b0 + b) * r + l]) : g[l]);
#pragma unroll
            for (int c = 0; c < TC; ++c) mine[b * TC + c] += y * w[c];
          }
        }
        warp_sums<N>(mine);
        double* sums = room + turn * warps * N;
        if (lane % (kWarp / N) == 0) sums[warp * N + lane / (kWarp / N)] = mine[0];
        __syncthreads();
        const int i = threadIdx.x, b = b0 + i / TC, c = c0 + i % TC;
        if (i < N && b <= m && c < columns) {
          double total = 0;
          for (int other = 0; other < warps; ++other) total += sums[other * N + i];
          const int feature = b < m ? a * m - a * (a - 1) / 2 + b - a : m * (m + 1) / 2 + a;
          moments[feature * columns + c] = total;
        }
      }
    }
  }
  __syncthreads();
}

template <class Float>
__device__ void converged(const Float* all, int m, long long r, const double* w, const double* g, const double* rest,
                          const double* null, double scale, double* v, double* coef, int* singular) {
  extern __shared__ double shared[];
  const long long block = blockIdx.x;
  const Float* u = all + block * m * r;
  double *moments = shared, *matrix = moments + features(m), *y = matrix + m * m, *room = y + m;
  add_moments<4, 1>(u, m, r, g, w, 1, room, moments);
  if (threadIdx.x == 0) {
    if (!solve_removed(moments, 1, 0, m, null + block * m * m, rest + block * m, scale, matrix, y))
      atomicAdd(singular, 1);
    for (int a = 0; a < m; ++a) v[block * m + a] = y[a];
  }
  __syncthreads();
  for (long long l = threadIdx.x; l < r; l += blockDim.x) {
    double total = 0;
    for (int a = 0; a < m; ++a) total += y[a] * static_cast<double>(u[a * r + l]);
    coef[block * r + l] = -w[l] * total;
  }
}

template <class Float>
__device__ void rational(const Float* all, int m, long long r, const double* g, const double* rest, const double* null,
                         const double* r0, int count, const double* table, const Complex* scale,
                         const Complex* residues, double constant, double* coef, int* singular, int group) {
  extern __shared__ double shared[];
  const long long block = blockIdx.x;
  const Float* u = all + block * m * r;
  double *moments = shared, *systems = moments + features(m) * 2 * group;
  Complex *matrix = reinterpret_cast<Complex*>(systems), *y = matrix + group * m * m;
  double* room = reinterpret_cast<double*>(y + group * m);
  for (long long l = threadIdx.x; l < r; l += blockDim.x) {
    double total = 0;
    for (int a = 0; a < m; ++a) total += r0[block * m + a] * static_cast<double>(u[a * r + l]);
    coef[block * r + l] = -constant * total;
  }
  for (int first = 0; first < count; first += group) {
    const int live = count - first < group ? count - first : group;
    const double* rows = table + 2 * first * r;
    add_moments<2, 8>(u, m, r, g, rows, 2 * live, room, moments);
    for (int q = threadIdx.x; q < live; q += blockDim.x) {
      Complex* own = y + q * m;
      if (!solve_removed(moments, 2 * live, 2 * q, m, null + block * m * m, rest + block * m, scale[first + q],
                         matrix + q * m * m, own))
        atomicAdd(singular, 1);
      for (int a = 0; a < m; ++a) own[a] = multiply(residues[first + q], own[a]);
    }
    __syncthreads();
    for (long long l = threadIdx.x; l < r; l += blockDim.x) {
      double total = 0;
      for (int q0 = 0; q0 < live; q0 += kPoles) {
        double re[kPoles] = {}, im[kPoles] = {};
        for (int a = 0; a < m; ++a) {
          const double value = static_cast<double>(u[a * r + l]);
#pragma unroll
          for (int q = 0; q < kPoles; ++q) {
            if (q0 + q >= live) continue;
            re[q] += y[(q0 + q) * m + a].re * value;
            im[q] += y[(q0 + q) * m + a].im * value;
          }
        }
#pragma unroll
        for (int q = 0; q < kPoles; ++q)
          if (q0 + q < live) total += rows[2 * (q0 + q) * r + l] * re[q] - rows[(2 * (q0 + q) + 1) * r + l] * im[q];
      }
      coef[block * r + l] -= total;
    }
  }
}

}  // namespace sui

extern "C" __global__ void converged_removal_float32(const float* u, long long m, long long r, const double* w,
                                                     const double* g, const double* rest, const double* null,
                                                     double scale, double* v, double* coef, int* singular) {
  sui::converged(u, static_cast<int>(m), r, w, g, rest, null, scale, v, coef, singular);
}

extern "C" __global__ void converged_removal_float64(const double* u, long long m, long long r, const double* w,
                                                     const double* g, const double* rest, const double* null,
                                                     double scale, double* v, double* coef, int* singular) {
  sui::converged(u, static_cast<int>(m), r, w, g, rest, null, scale, v, coef, singular);
}

extern "C" __global__ void rational_removal_float32(const float* u, long long m, long long r, const double* g,
                                                    const double* rest, const double* null, const double* r0,
                                                    long long count, const double* table, const sui::Complex* scale,
                                                    const sui::Complex* residues, double constant, double* coef,
                                                    int* singular, long long group) {
  sui::rational(u, static_cast<int>(m), r, g, rest, null, r0, static_cast<int>(count), table, scale, residues, constant,
                coef, singular, static_cast<int>(group));
}

extern "C" __global__ void rational_removal_float64(const double* u, long long m, long long r, const double* g,
                                                    const double* rest, const double* null, const double* r0,
                                                    long long count, const double* table, const sui::Complex* scale,
                                                    const sui::Complex* residues, double constant, double* coef,
                                                    int* singular, long long group) {
  sui::rational(u, static_cast<int>(m), r, g, rest, null, r0, static_cast<int>(count), table, scale, residues, constant,
                coef, singular, static_cast<int>(group));
}
