// Block leave-one-out on the GPU: one block of threads for every removed block of m <= 32 rows, arithmetic of sui/resolvent.h.
//
//   moments   threads stride over r; kBatch sums at a time are reduced across the block
//   solve     one thread per pole, the m x m systems in shared memory
//   coef      threads stride over r again; u comes from the second cache
//
// As many poles at a time as shared memory holds. Sizes are long long and numbers double: the launcher passes 8 bytes each.
#include "sui/resolvent.h"

namespace sui {

constexpr int kBatch = 4, kWarp = 32;

// Sums of kBatch values over all threads, in sums[0 .. kBatch); room: kBatch doubles for every warp.
__device__ inline void block_sums(const double (&mine)[kBatch], double* room, double* sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int i = 0; i < kBatch; ++i) {
    double value = mine[i];
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
    if (lane == 0) room[warp * kBatch + i] = value;
  }
  __syncthreads();
  if (threadIdx.x < kBatch) {
    double total = 0;
    for (int w = 0; w < warps; ++w) total += room[w * kBatch + threadIdx.x];
    sums[threadIdx.x] = total;
  }
  __syncthreads();
}

// Rows a <= b of feature f of the order in sui/resolvent.h; b = m stands for g.
__device__ inline void feature_rows(int f, int m, int* a, int* b) {
  int row = 0;
  while (row < m && f >= m - row) f -= m - row++;
  *a = row < m ? row : f;
  *b = row < m ? row + f : m;
}

// Moments of all features against `columns` rows of the table, [features(m), columns].
template <class Float>
__device__ void add_moments(const Float* u, int m, long long r, const double* g, const double* table, int columns,
                            double* room, double* moments) {
  const int items = features(m) * columns;
  for (int first = 0; first < items; first += kBatch) {
    double mine[kBatch];
    for (int i = 0; i < kBatch; ++i) {
      mine[i] = 0;
      if (first + i >= items) continue;
      int a, b;
      feature_rows((first + i) / columns, m, &a, &b);
      const double* row = table + (first + i) % columns * r;
      const Float *x = u + a * r, *y = u + (b < m ? b : 0) * r;
      for (long long l = threadIdx.x; l < r; l += blockDim.x)
        mine[i] += static_cast<double>(x[l]) * (b < m ? static_cast<double>(y[l]) : g[l]) * row[l];
    }
    double* sums = room + blockDim.x / kWarp * kBatch;
    block_sums(mine, room, sums);
    if (threadIdx.x < kBatch && first + static_cast<int>(threadIdx.x) < items) moments[first + threadIdx.x] = sums[threadIdx.x];
    __syncthreads();
  }
}

template <class Float>
__device__ void converged(const Float* all, int m, long long r, const double* w, const double* g, const double* rest,
                          const double* null, double scale, double* v, double* coef, int* singular) {
  extern __shared__ double shared[];
  const long long block = blockIdx.x;
  const Float* u = all + block * m * r;
  double *moments = shared, *matrix = moments + features(m), *y = matrix + m * m, *room = y + m;
  add_moments(u, m, r, g, w, 1, room, moments);
  if (threadIdx.x == 0) {
    if (!solve_removed(moments, 1, 0, m, null + block * m * m, rest + block * m, scale, matrix, y)) atomicAdd(singular, 1);
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
                         const double* r0, int count, const double* table, const Complex* scale, const Complex* residues,
                         double constant, double* coef, int* singular, int group) {
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
    add_moments(u, m, r, g, rows, 2 * live, room, moments);
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
      for (int q = 0; q < live; ++q) {
        double re = 0, im = 0;
        for (int a = 0; a < m; ++a) {
          const double value = static_cast<double>(u[a * r + l]);
          re += y[q * m + a].re * value;
          im += y[q * m + a].im * value;
        }
        total += rows[2 * q * r + l] * re - rows[(2 * q + 1) * r + l] * im;
      }
      coef[block * r + l] -= total;
    }
    __syncthreads();  // y and moments are written anew
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
