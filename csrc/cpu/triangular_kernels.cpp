// out[i] = ||C x_i||^2, C upper triangular, of vectors or of the changes as single rows leave, forms with a diagonal, and
// squared rows of products; compiled once per instruction set (see CMakeLists.txt), therefore without the standard library.
//
// A tile of C x holds kRows rows of C and kVectors vectors of samples in registers, and never leaves them: its squares
// are added to one sum per sample. C lies in panels of kRows rows, each from its diagonal on, column after column, and
// chunk after chunk of columns, so that those of a group stay in the first cache while all of C passes by; a
// group of samples is turned to [r, group], so that a column of it is kVectors loads and every number of C one broadcast.
#include "triangular.h"

#include "simd.h"
#include "sui/resolvent.h"

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
    for (Index panel = 0; panel < reached(p, end); ++panel) {
      const Index first = panel * kRows;
      for (Index l = start(panel, begin); l < end;) {
        if (kRows == kLanes && first + kRows <= p && l >= first + kRows && l + kLanes <= end) {
          Lane square[kLanes];
          for (Index row = 0; row < kLanes; ++row) square[row] = at(c + (first + row) * r + l);
          transpose<double>(square);
          for (Index column = 0; column < kLanes; ++column, ++l, out += kRows) at(out) = square[column];
        } else {
          for (Index row = first; row < first + kRows; ++row) *out++ = row < p && row <= l ? c[row * r + l] : 0;
          ++l;
        }
      }
    }
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

// ||C x||^2 of a turned group x [r, kGroup]
void form(const double* c, Index p, Index r, const double* x, Index live, double* held, double* out) {
  Lane total[kVectors] = {};
  for (Index begin = 0; begin < r; begin += kChunk) {
    const Index end = least(begin + kChunk, r);
    for (Index panel = 0; panel < reached(p, end); ++panel) {
      const Index from = start(panel, begin), width = end - from;
      const double* column = x + from * kGroup;
      double* sums = held + panel * kRows * kGroup;
      const bool fresh = panel * kRows >= begin;
      if (end < r)
        fresh ? tile<true, false>(c, column, width, sums, total) : tile<false, false>(c, column, width, sums, total);
      else
        fresh ? tile<true, true>(c, column, width, sums, total) : tile<false, true>(c, column, width, sums, total);
      c += kRows * width;
    }
  }
  for (Index i = 0; i < live; ++i) out[i] = total[i / kLanes][i % kLanes];
}

void run(const double* packed, Index p, Index r, const double* x, Index count, double* scratch, double* out) {
  for (Index first = 0; first < count; first += kGroup) {
    const Index live = least(kGroup, count - first);
    turn(x + first * r, live, r, scratch);
    form(packed, p, r, scratch, live, scratch + r * kGroup, out + first);
  }
}

// Single rows -------------------------------------------------------------------------------------------------------
//
// A row u that leaves changes the weights on the eigenvectors by -(constant r0 + sum_c weight_c table_c) u, its weights from
// the sums of u^2 and u g against the table, to which a column of ones may be added: what u misses. A turned group stays in
// cache from u over its change to the form.

#if defined(__AVX512F__)
constexpr Index kPass = 4, kColumns = 4;  // rows of the table in one look at a group; columns of it at a time on the way back
#elif defined(__AVX2__)
constexpr Index kPass = 1, kColumns = 2;
#else
constexpr Index kPass = 2, kColumns = 2;
#endif

// Passes over a table with the column of ones.
SUI_FN Index passes(Index columns) { return (columns + kPass) / kPass; }

Index single_table(Index columns, Index r) { return r * (2 * passes(columns) * kPass + columns); }

Index single_scratch(Index columns, Index r) { return scratch(r) + (2 * passes(columns) * kPass + columns + 1) * kGroup; }

// For every pass and l kPass numbers of the table, and these times g; then for every l all numbers of the table.
void pack_singles(const Removal& all, double* out) {
  for (Index pass = 0; pass < passes(all.columns); ++pass)
    for (Index l = 0; l < all.r; ++l)
      for (int times = 0; times < 2; ++times)
        for (Index c = pass * kPass; c < (pass + 1) * kPass; ++c)
          *out++ = (c < all.columns ? all.table[c * all.width + l] : c == all.columns) * (times ? all.gain[l] : 1);
  for (Index l = 0; l < all.r; ++l)
    for (Index c = 0; c < all.columns; ++c) *out++ = all.table[c * all.width + l];
}

// out[c] = sum_l table[l, c] x[l]^2 for kPass columns, then sum_l table[l, c] x[l] for as many
void look(const double* table, const double* x, Index r, double* out) {
  Lane sums[2 * kPass][kVectors] = {};
  for (Index l = 0; l < r; ++l, x += kGroup, table += 2 * kPass) {
    Lane own[kVectors], square[kVectors];
#pragma GCC unroll 8
    for (Index v = 0; v < kVectors; ++v) own[v] = at(x + v * kLanes), square[v] = own[v] * own[v];
#pragma GCC unroll 8
    for (Index c = 0; c < kPass; ++c)
#pragma GCC unroll 8
      for (Index v = 0; v < kVectors; ++v) sums[c][v] += table[c] * square[v];
#pragma GCC unroll 8
    for (Index c = kPass; c < 2 * kPass; ++c)
#pragma GCC unroll 8
      for (Index v = 0; v < kVectors; ++v) sums[c][v] += table[c] * own[v];
  }
#pragma GCC unroll 8
  for (Index c = 0; c < 2 * kPass; ++c)
#pragma GCC unroll 8
    for (Index v = 0; v < kVectors; ++v) at(out + c * kGroup + v * kLanes) = sums[c][v];
}

// Weights [columns + 1, kGroup] of the table and of a constant, from what `look` found [passes, 2, kPass, kGroup].
Index solve_singles(const Removal& all, bool outside, Index first, Index live, const double* found, double* weights) {
  const auto sums = [&](Index column) { return found + (column / kPass * 2 * kPass + column % kPass) * kGroup; };
  Index singular = 0;
  for (Index i = 0; i < kGroup; ++i) {
    const bool counts = i < live;
    for (Index q = 0; 2 * q < all.columns; ++q) {
      Complex y{0, 0};
      if (counts) {
        const double *re = sums(2 * q) + i, *im = sums(2 * q + 1) + i, *ones = sums(all.columns) + i;
        const double null = outside ? 1 - ones[0] : 0, rest = outside ? all.r0[first + i] - ones[kPass * kGroup] : 0;
        Complex kernel = add(Complex{re[0], im[0]}, scaled(all.scale[q], null));
        y = add(Complex{re[kPass * kGroup], im[kPass * kGroup]}, scaled(all.scale[q], rest));
        singular += !solve(&kernel, &y, 1);
      }
      const Complex weight = multiply(all.residues[q], y);
      weights[2 * q * kGroup + i] = weight.re;
      weights[(2 * q + 1) * kGroup + i] = -weight.im;
    }
    weights[all.columns * kGroup + i] = counts ? all.constant * all.r0[first + i] : 0;
  }
  return singular;
}

// x = base - (weights . table) x for L columns l; sqnorm += s x^2, inner += s (x + trained) u with the x of before as u.
template <Index L>
SUI_FN void change(const double* table, Index columns, const double* weights, const double* base, const double* trained,
                   const double* s, double* x, Lane* sqnorm, Lane* inner) {
  Lane sums[L][kVectors];
#pragma GCC unroll 8
  for (Index i = 0; i < L; ++i)
#pragma GCC unroll 8
    for (Index v = 0; v < kVectors; ++v) sums[i][v] = at(weights + columns * kGroup + v * kLanes);
  for (Index c = 0; c < columns; ++c) {
    Lane weight[kVectors];
#pragma GCC unroll 8
    for (Index v = 0; v < kVectors; ++v) weight[v] = at(weights + c * kGroup + v * kLanes);
#pragma GCC unroll 8
    for (Index i = 0; i < L; ++i)
#pragma GCC unroll 8
      for (Index v = 0; v < kVectors; ++v) sums[i][v] += table[i * columns + c] * weight[v];
  }
#pragma GCC unroll 8
  for (Index i = 0; i < L; ++i)
#pragma GCC unroll 8
    for (Index v = 0; v < kVectors; ++v) {
      Lane& own = at(x + i * kGroup + v * kLanes);
      const Lane moved = base[i] - sums[i][v] * own, weighed = s[i] * moved;
      sqnorm[v] += weighed * moved, inner[v] += (weighed + s[i] * trained[i]) * own;
      own = moved;
    }
}

Index singles(const Removal& all, bool outside, const double* table, const double* base, const double* trained,
              const double* s, const double* c, Index p, Index begin, Index end, double* room, double* reached, double* sqnorm,
              double* out) {
  const Index r = all.r, columns = all.columns, wide = 2 * kPass * r;
  const double *u = static_cast<const double*>(all.u), *back = table + passes(columns) * wide;
  double *x = room, *held = x + r * kGroup, *found = room + scratch(r), *weights = found + passes(columns) * 2 * kPass * kGroup;
  Index singular = 0;
  for (Index first = begin; first < end; first += kGroup) {
    const Index live = least(kGroup, end - first);
    turn(u + first * r, live, r, x);
    for (Index pass = 0; pass < passes(columns); ++pass)
      look(table + pass * wide, x, r, found + pass * 2 * kPass * kGroup);
    singular += solve_singles(all, outside, first, live, found, weights);
    Lane square[kVectors] = {}, inner[kVectors] = {};
    Index l = 0;
    for (; l + kColumns <= r; l += kColumns)
      change<kColumns>(back + l * columns, columns, weights, base + l, trained + l, s + l, x + l * kGroup, square, inner);
    for (; l < r; ++l)
      change<1>(back + l * columns, columns, weights, base + l, trained + l, s + l, x + l * kGroup, square, inner);
    for (Index i = 0; i < live; ++i) {
      sqnorm[first + i] = square[i / kLanes][i % kLanes];
      reached[first + i] = inner[i / kLanes][i % kLanes];
    }
    form(c, p, r, x, live, held, out + first);
  }
  return singular;
}

// Blocks of rows ----------------------------------------------------------------------------------------------------

SUI_FN double sum(const Lane& x) {
  double total = 0;
  for (Index lane = 0; lane < kLanes; ++lane) total += x[lane];
  return total;
}

void weigh(double* x, const double* base, const double* trained, const double* s, const double* u, Index m, Index r,
           Index count, double* sqnorm, double* inner) {
  for (Index i = 0; i < count; ++i, x += r) {
    Lane square = {}, first = {};
    const double* row = u + i * m * r;
    Index l = 0;
    double square_rest = 0, first_rest = 0;
    for (; l + kLanes <= r; l += kLanes) {
      const Lane moved = at(x + l) + at(base + l), weighed = at(s + l) * moved;
      at(x + l) = moved;
      square += weighed * moved;
      if (m) first += (weighed + at(s + l) * at(trained + l)) * at(row + l);
    }
    for (; l < r; ++l) {
      x[l] += base[l];
      square_rest += s[l] * x[l] * x[l];
      if (m) first_rest += s[l] * (x[l] + trained[l]) * row[l];
    }
    sqnorm[i] = sum(square) + square_rest;
    if (m) inner[i * m] = sum(first) + first_rest;
    for (Index a = 1; a < m; ++a) {
      Lane total = {};
      double rest = 0;
      for (l = 0; l + kLanes <= r; l += kLanes) total += at(s + l) * (at(x + l) + at(trained + l)) * at(row + a * r + l);
      for (; l < r; ++l) rest += s[l] * (x[l] + trained[l]) * row[a * r + l];
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
const TriangularKernels SUI_JOIN(triangular_, SUI_VARIANT) = {
    packed, scratch, pack, run, weigh, single_table, single_scratch, pack_singles, singles, product_scratch, products};

}  // namespace sui
