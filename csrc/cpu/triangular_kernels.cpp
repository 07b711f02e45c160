// out[i] = ||C x_i||^2, C upper triangular, forms with a diagonal, and squared rows of products; compiled once per instruction
// set (see CMakeLists.txt), therefore without the standard library.
//
// A tile of C x holds kRows rows of C and kVectors vectors of samples in registers, and never leaves them: its squares
// are added to one sum per sample. C lies in panels of kRows rows, each from its diagonal on, column after column, and
// chunk after chunk of columns, so that those of a group stay in the first cache while all of C passes by; a
// group of samples is turned to [r, group], so that a column of it is kVectors loads and every number of C one broadcast.
#include "triangular.h"

#include "simd.h"

namespace sui {
namespace {

using Lane = Vector<double>;
constexpr Index kLanes = Simd<double>::lanes;
#if defined(__AVX512F__)
constexpr Index kRows = 8, kVectors = 3;  // of 32 registers
#elif defined(__AVX2__)
constexpr Index kRows = 4, kVectors = 3;  // of 16
#else
constexpr Index kRows = 4, kVectors = 2;
#endif
constexpr Index kGroup = kVectors * kLanes;
static_assert(kGroups % kGroup == 0, "a portion is whole groups");

constexpr Index kChunk = 128;  // columns at a time: of a group they fit the first cache
static_assert(kChunk % kRows == 0, "a chunk is whole panels");

SUI_FN Index least(Index a, Index b) { return a < b ? a : b; }
SUI_FN Index panels(Index p) { return (p + kRows - 1) / kRows; }

// Column at which a panel begins in the chunk from `begin` on: that of its first row at the earliest.
SUI_FN Index start(Index panel, Index begin) { return panel * kRows > begin ? panel * kRows : begin; }

// Panels that have numbers in the columns before `end`.
SUI_FN Index reached(Index p, Index end) { return least(panels(p), panels(end)); }

Index packed(Index p, Index r) {
  Index total = 0;
  for (Index panel = 0; panel < panels(p); ++panel) total += kRows * (r - panel * kRows);
  return total;
}

// A turned group, and the sums of it that chunks hand on.
Index scratch(Index r) { return (r + panels(r) * kRows) * kGroup; }

void pack(const double* c, Index p, Index r, double* out) {
  for (Index begin = 0; begin < r; begin += kChunk) {
    const Index end = least(begin + kChunk, r);
    for (Index panel = 0; panel < reached(p, end); ++panel)
      for (Index l = start(panel, begin); l < end; ++l)
        for (Index row = panel * kRows; row < (panel + 1) * kRows; ++row)
          *out++ = row < p && row <= l ? c[row * r + l] : 0;
  }
}

// [count, r] to [r, kGroup], zeros beyond count
void turn(const double* x, Index count, Index r, double* out) {
  for (Index first = 0; first < kGroup; first += kLanes) {
    Index l = 0;
    if (first + kLanes <= count) {
      for (; l + kLanes <= r; l += kLanes) {
        Lane square[kLanes];
        for (Index i = 0; i < kLanes; ++i) square[i] = at(x + (first + i) * r + l);
        transpose<double>(square);
        for (Index i = 0; i < kLanes; ++i) at(out + (l + i) * kGroup + first) = square[i];
      }
    }
    for (; l < r; ++l)
      for (Index i = first; i < first + kLanes; ++i) out[l * kGroup + i] = i < count ? x[i * r + l] : 0;
  }
}

// A panel of C times `count` columns of a group, on top of `held` unless First; its squares to total if Last, or else held.
template <bool First, bool Last>
SUI_FN void tile(const double* c, const double* column, Index count, double* held, Lane* total) {
  Lane sums[kRows][kVectors] = {};
  if (!First)
#pragma GCC unroll 8
    for (Index a = 0; a < kRows; ++a)
#pragma GCC unroll 8
      for (Index v = 0; v < kVectors; ++v) sums[a][v] = at(held + a * kGroup + v * kLanes);
  for (Index l = 0; l < count; ++l, column += kGroup, c += kRows) {
    Lane own[kVectors];
#pragma GCC unroll 8
    for (Index v = 0; v < kVectors; ++v) own[v] = at(column + v * kLanes);
#pragma GCC unroll 8
    for (Index a = 0; a < kRows; ++a)
#pragma GCC unroll 8
      for (Index v = 0; v < kVectors; ++v) sums[a][v] += c[a] * own[v];
  }
#pragma GCC unroll 8
  for (Index a = 0; a < kRows; ++a)
#pragma GCC unroll 8
    for (Index v = 0; v < kVectors; ++v)
      if (Last)
        total[v] += sums[a][v] * sums[a][v];
      else
        at(held + a * kGroup + v * kLanes) = sums[a][v];
}

void run(const double* packed, Index p, Index r, const double* x, Index count, double* scratch, double* out) {
  double* held = scratch + r * kGroup;
  for (Index first = 0; first < count; first += kGroup) {
    const Index live = least(kGroup, count - first);
    turn(x + first * r, live, r, scratch);
    Lane total[kVectors] = {};
    const double* c = packed;
    for (Index begin = 0; begin < r; begin += kChunk) {
      const Index end = least(begin + kChunk, r);
      for (Index panel = 0; panel < reached(p, end); ++panel) {
        const Index from = start(panel, begin), width = end - from;
        const double* column = scratch + from * kGroup;
        double* sums = held + panel * kRows * kGroup;
        const bool fresh = panel * kRows >= begin;
        if (end < r)
          fresh ? tile<true, false>(c, column, width, sums, total) : tile<false, false>(c, column, width, sums, total);
        else
          fresh ? tile<true, true>(c, column, width, sums, total) : tile<false, true>(c, column, width, sums, total);
        c += kRows * width;
      }
    }
    for (Index i = 0; i < live; ++i) out[first + i] = total[i / kLanes][i % kLanes];
  }
}

SUI_FN double sum(const Lane& x) {
  double total = 0;
  for (Index lane = 0; lane < kLanes; ++lane) total += x[lane];
  return total;
}

void weigh(double* x, const double* base, const double* s, const double* u, Index m, Index r, Index count,
           double* sqnorm, double* inner) {
  for (Index i = 0; i < count; ++i, x += r) {
    Lane square = {}, first = {};
    const double* row = u + i * m * r;
    Index l = 0;
    double square_rest = 0, first_rest = 0;
    for (; l + kLanes <= r; l += kLanes) {
      const Lane moved = at(x + l) + at(base + l), weighed = at(s + l) * moved;
      at(x + l) = moved;
      square += weighed * moved;
      if (m) first += weighed * at(row + l);
    }
    for (; l < r; ++l) {
      x[l] += base[l];
      square_rest += s[l] * x[l] * x[l];
      if (m) first_rest += s[l] * x[l] * row[l];
    }
    sqnorm[i] = sum(square) + square_rest;
    if (m) inner[i * m] = sum(first) + first_rest;
    for (Index a = 1; a < m; ++a) {
      Lane total = {};
      double rest = 0;
      for (l = 0; l + kLanes <= r; l += kLanes) total += at(s + l) * at(x + l) * at(row + a * r + l);
      for (; l < r; ++l) rest += s[l] * x[l] * row[a * r + l];
      inner[i * m + a] = sum(total) + rest;
    }
  }
}

// A tile of a m: N rows of a, W vectors of columns. Its squares go to one vector for each row.
template <int N, int W>
void square_tile(const double* a, Index a_row, const double* m, Index m_row, const double* base, Index base_row, Index v,
                 Lane* sums) {
  Lane tile[N][W];
#pragma GCC unroll 8
  for (Index i = 0; i < N; ++i)
#pragma GCC unroll 8
    for (Index w = 0; w < W; ++w) tile[i][w] = at(base + i * base_row + w * kLanes);
  for (Index l = 0; l < v; ++l, ++a, m += m_row) {
    Lane held[W];
#pragma GCC unroll 8
    for (Index w = 0; w < W; ++w) held[w] = at(m + w * kLanes);
#pragma GCC unroll 8
    for (Index i = 0; i < N; ++i)
#pragma GCC unroll 8
      for (Index w = 0; w < W; ++w) tile[i][w] += a[i * a_row] * held[w];
  }
#pragma GCC unroll 8
  for (Index i = 0; i < N; ++i)
#pragma GCC unroll 8
    for (Index w = 0; w < W; ++w) sums[i] += tile[i][w] * tile[i][w];
}

// All t rows of a, in tiles of much the same height.
template <int W>
void square_strip(const Rows& a, const double* m, Index m_row, const double* base, Index base_row, Index v, Lane* sums) {
  const Index tiles = (a.count + kRows - 1) / kRows;
  for (Index tile = 0; tile < tiles; ++tile) {
    const Index begin = a.count * tile / tiles, height = a.count * (tile + 1) / tiles - begin;
    const double *rows = a.at + begin * a.stride, *own = base + begin * base_row;
    switch (height) {
#define SUI_HEIGHT(N) \
  case N: square_tile<(N <= kRows ? N : 1), W>(rows, a.stride, m, m_row, own, base_row, v, sums + begin); break;
      SUI_HEIGHT(1) SUI_HEIGHT(2) SUI_HEIGHT(3) SUI_HEIGHT(4) SUI_HEIGHT(5) SUI_HEIGHT(6) SUI_HEIGHT(7) SUI_HEIGHT(8)
#undef SUI_HEIGHT
    }
  }
}

Index product_scratch(Index t, Index v) { return (2 * t + v) * kLanes; }

void products(const Rows& a, const Rows& m, const Rows& base, Index p, double* scratch, double* out) {
  const Index t = a.count, v = m.count;
  Lane* sums = reinterpret_cast<Lane*>(scratch);
  for (Index i = 0; i < t; ++i) sums[i] = Lane{};
  Index column = 0;
  for (; column + kGroup <= p; column += kGroup)
    square_strip<kVectors>(a, m.at + column, m.stride, base.at + column, base.stride, v, sums);
  for (; column + kLanes <= p; column += kLanes)
    square_strip<1>(a, m.at + column, m.stride, base.at + column, base.stride, v, sums);
  if (column < p) {  // the rest, filled up with zeros
    double *own_base = scratch + t * kLanes, *own = own_base + t * kLanes;
    for (Index lane = 0; lane < kLanes; ++lane) {
      const bool live = column + lane < p;
      for (Index i = 0; i < t; ++i) own_base[i * kLanes + lane] = live ? base.at[i * base.stride + column + lane] : 0;
      for (Index l = 0; l < v; ++l) own[l * kLanes + lane] = live ? m.at[l * m.stride + column + lane] : 0;
    }
    square_strip<1>(a, own, kLanes, own_base, kLanes, v, sums);
  }
  for (Index i = 0; i < t; ++i) out[i] = sum(sums[i]);
}

}  // namespace

extern const TriangularKernels SUI_JOIN(triangular_, SUI_VARIANT);
const TriangularKernels SUI_JOIN(triangular_, SUI_VARIANT) = {packed,          scratch,  pack, run, weigh,
                                                                     product_scratch, products};

}  // namespace sui
