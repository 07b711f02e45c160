// The work on blocks, compiled once per instruction set (see CMakeLists.txt). No standard library: an inline function
// shared between the objects would let the linker put AVX-512 code into the baseline.
//
//   moments   features (products of two rows of u, or of a row and g) times the table: dot products over r
//   solve     m x m per block and pole, sui/resolvent.h
//   back      coef = -sum_a u_a (constant r0_a + sum_c table_c weight_ac)
//
// The real form has one table row, and skips the features: u diag(w) u^T as tiles of dot products, straight from memory.
//
// Both products hold a tile of sums in registers: kTile features x kColumns table rows, kTile rows x kVectors vectors.
// A group of blocks and kChunk columns of u stay in cache, as doubles.
#include "removal.h"

#include "sui/resolvent.h"

#define SUI_JOIN_(a, b) a##b
#define SUI_JOIN(a, b) SUI_JOIN_(a, b)

namespace sui {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8, kTile = 8, kColumns = 3, kVectors = 3;  // 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 4, kTile = 4, kColumns = 2, kVectors = 2;
#else
constexpr int kLanes = 2, kTile = 4, kColumns = 2, kVectors = 2;  // SSE2, NEON
#endif
constexpr int kRows = 16, kStrip = 4;
constexpr Index kChunk = 256;  // kTile features and three rows of the table fit the first cache, the group the second
static_assert(kAlign % kLanes == 0 && kChunk % kAlign == 0, "vectors must tile a padded row");
static_assert(kTile % kLanes == 0, "sums of a tile are taken kLanes at a time");

typedef double Vector __attribute__((vector_size(kLanes * sizeof(double)), aligned(sizeof(double)), may_alias));

SUI_FN Vector& at(double* p) { return *reinterpret_cast<Vector*>(p); }
SUI_FN const Vector& at(const double* p) { return *reinterpret_cast<const Vector*>(p); }

template <int H = kLanes / 2>
SUI_FN double sum(const Vector& x) {
  if constexpr (H == 0) {
    return x[0];
  } else {
    decltype(x == x) turned;
#pragma GCC unroll 8
    for (int lane = 0; lane < kLanes; ++lane) turned[lane] = (lane + H) % kLanes;
    return sum<H / 2>(x + __builtin_shuffle(x, turned));
  }
}

// Lane i: the sum of x[i], i < W = kLanes; two halves meet at every step, which costs half of one sum after the other.
template <int W = kLanes>
SUI_FN Vector sums_of(const Vector* x) {
  if constexpr (W == 1) {
    return x[0];
  } else {
    constexpr int half = W / 2;
    const Vector a = sums_of<half>(x), b = sums_of<half>(x + half);
    decltype(a == a) low, high;
#pragma GCC unroll 8
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane / W * W + lane % half + (lane % W < half ? 0 : kLanes);
      high[lane] = low[lane] + half;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
}

// out[i, c] += features[i] . table[c] for kTile features and C rows of the table
template <int C>
SUI_FN void tile_moments(const double* features, const double* table, Index width, Index count, double* out,
                         Index columns) {
  Vector sums[C][kTile] = {};
  for (Index l = 0; l < count; l += kLanes) {
    Vector row[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) row[c] = at(table + c * width + l);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      const Vector feature = at(features + i * kChunk + l);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[c][i] += feature * row[c];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int i = 0; i < kTile; i += kLanes) {
      const Vector total = sums_of(sums[c] + i);
#pragma GCC unroll 8
      for (int lane = 0; lane < kLanes; ++lane) out[(i + lane) * columns + c] += total[lane];
    }
}

static void moments_of(const double* features, const double* table, Index width, Index count, double* out,
                       int columns) {
  int c = 0;
  for (; c + kColumns <= columns; c += kColumns)
    tile_moments<kColumns>(features, table + c * width, width, count, out + c, columns);
  if (c + 2 <= columns) {
    tile_moments<2>(features, table + c * width, width, count, out + c, columns);
    c += 2;
  }
  if (c < columns) tile_moments<1>(features, table + c * width, width, count, out + c, columns);
}

// Rows of double, stride apart.
struct Rows {
  const double* begin;
  Index stride;
  const double* operator[](Index row) const { return begin + row * stride; }
};

// out[i, l] = -(offset_i + sum_c weight[i, c] table[c, l]) rows[i, l] for kTile rows and V vectors
template <int V>
SUI_FN void tile_back(Rows rows, const double* table, Index width, const double* weights, const double* offsets,
                      int columns, double* out, Index out_stride) {
  Vector sums[kTile][V];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[i][v] = Vector{} + offsets[i];
  for (int c = 0; c < columns; ++c) {
    Vector row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = at(table + c * width + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      const double weight = weights[Index(i) * columns + c];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[i][v] += weight * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) at(out + i * out_stride + v * kLanes) = -sums[i][v] * at(rows[i] + v * kLanes);
}

struct Group {
  double *rows;      // [blocks of the group * m, rounded up to kTile; kChunk]
  double *features;  // [kTile, kChunk]
  double *moments;   // [blocks * features(m), rounded up to kTile; columns]
  double *weights;   // [rows, columns]
  double *offsets;   // [rows]
  Complex *matrix;   // [m, m]
  Complex *y;        // [m]
};

SUI_FN Index round_up(Index x, Index to) { return (x + to - 1) / to * to; }
SUI_FN Index group_blocks(const Removal& p) { return p.m && kRows > p.m ? kRows / p.m : 1; }

Index lay_out(const Removal& p, double* scratch, Group* group) {
  const Index blocks = group_blocks(p), rows = round_up(blocks * p.m, kTile);
  Index used = 0;
  const auto take = [&](Index count) {
    const Index begin = used;
    used += round_up(count, kAlign);
    return scratch + begin;
  };
  Group laid;
  laid.rows = take(rows * kChunk);
  laid.features = take(kTile * kChunk);
  laid.moments = take(round_up(blocks * features(p.m), kTile) * p.columns);
  laid.weights = take(rows * p.columns);
  laid.offsets = take(rows);
  laid.matrix = reinterpret_cast<Complex*>(take(2 * Index(p.m) * p.m));
  laid.y = reinterpret_cast<Complex*>(take(2 * p.m));
  if (group) *group = laid;
  return used;
}

template <class Float>
void load_rows(const Float* u, Index r, Index rows, Index begin, Index count, double* out) {
  const Index live = r - begin < count ? r - begin : count;
  for (Index row = 0; row < rows; ++row) {
    const Float* from = u + row * r + begin;
    double* to = out + row * kChunk;
    for (Index l = 0; l < live; ++l) to[l] = from[l];
    for (Index l = live; l < count; ++l) to[l] = 0;
  }
}

// Whether tiles may read u, and write coef, in place.
SUI_FN bool in_place(const Removal& p, Index rows) { return !p.single && p.r == p.width && rows % kTile == 0; }

Rows rows_of(const Removal& p, Index first, Index rows, Index begin, Index count, const Group& group) {
  const Index offset = first * p.m * p.r;
  if (in_place(p, rows)) return {static_cast<const double*>(p.u) + offset + begin, p.r};
  if (p.single)
    load_rows(static_cast<const float*>(p.u) + offset, p.r, rows, begin, count, group.rows);
  else
    load_rows(static_cast<const double*>(p.u) + offset, p.r, rows, begin, count, group.rows);
  return {group.rows, kChunk};
}

void add_moments(const Removal& p, Rows rows, Index blocks, Index begin, Index count, const Group& group) {
  const double* table = p.table + begin;
  double* out = group.moments;
  int held = 0;
  const auto push = [&](const double* x, const double* y) {
    double* feature = group.features + held * kChunk;
    for (Index l = 0; l < count; l += kLanes) at(feature + l) = at(x + l) * at(y + l);
    if (++held == kTile) {
      moments_of(group.features, table, p.width, count, out, p.columns);
      out += Index(kTile) * p.columns;
      held = 0;
    }
  };
  for (Index block = 0; block < blocks; ++block) {
    const Index row = block * p.m;
    for (int a = 0; a < p.m; ++a)
      for (int b = a; b < p.m; ++b) push(rows[row + a], rows[row + b]);
    for (int a = 0; a < p.m; ++a) push(rows[row + a], p.gain + begin);
  }
  if (held) moments_of(group.features, table, p.width, count, out, p.columns);  // the rest of the tile is not read
}

// Real form ---------------------------------------------------------------------------------------------------------

typedef float Single __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

SUI_FN Vector load(const double* p) { return at(p); }
SUI_FN Vector load(const float* p) { return __builtin_convertvector(*reinterpret_cast<const Single*>(p), Vector); }

// matrix[a, b] = x_a diag(w) y_b for A x B rows of u, r apart; only b >= a where x and y are the same rows.
template <int A, int B, bool Same, class Float>
SUI_FN void tile_gram(const Float* x, const Float* y, Index r, const double* w, double* matrix, int m) {
  Vector sums[A][B] = {};
  Index l = 0;
  for (; l + kLanes <= r; l += kLanes) {
    const Vector weight = at(w + l);
    Vector right[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) right[b] = load(y + b * r + l);
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      const Vector left = (Same ? right[a < B ? a : 0] : load(x + a * r + l)) * weight;
#pragma GCC unroll 8
      for (int b = Same ? a : 0; b < B; ++b) sums[a][b] += left * right[b];
    }
  }
  for (int a = 0; a < A; ++a)
    for (int b = Same ? a : 0; b < B; ++b) {
      double total = sum(sums[a][b]);
      for (Index t = l; t < r; ++t) total += double(x[a * r + t]) * w[t] * double(y[b * r + t]);
      matrix[a * m + b] = total;
    }
}

template <int A, class Float>
SUI_FN void gram_strip(const Float* u, int a, int m, Index r, const double* w, double* matrix) {
  const Float* x = u + a * r;
  double* row = matrix + Index(a) * m;
  tile_gram<A, A, true>(x, x, r, w, row + a, m);
  int b = a + A;
  for (; b + kStrip <= m; b += kStrip) tile_gram<A, kStrip, false>(x, u + b * r, r, w, row + b, m);
  if (m - b == 3) tile_gram<A, 3, false>(x, u + b * r, r, w, row + b, m);
  if (m - b == 2) tile_gram<A, 2, false>(x, u + b * r, r, w, row + b, m);
  if (m - b == 1) tile_gram<A, 1, false>(x, u + b * r, r, w, row + b, m);
}

// coef[l] = -w_l sum_a y_a u_a,l for R rows at a time, added from the second time on.
template <int R, class Float>
SUI_FN void tile_coef(const Float* u, Index r, const double* w, const double* y, bool first, double* coef) {
  Index l = 0;
  for (; l + kLanes <= r; l += kLanes) {
    Vector total = y[0] * load(u + l);
#pragma GCC unroll 8
    for (int a = 1; a < R; ++a) total += y[a] * load(u + a * r + l);
    total *= -at(w + l);
    at(coef + l) = first ? total : at(coef + l) + total;
  }
  for (; l < r; ++l) {
    double total = 0;
    for (int a = 0; a < R; ++a) total += y[a] * double(u[a * r + l]);
    coef[l] = (first ? 0 : coef[l]) - w[l] * total;
  }
}

// A block stays in cache between its two passes. room: matrix [m, m] and y [m]; table: w, then w g.
template <class Float>
Index run_real(const Removal& p, const Float* all, Index begin, Index end, double* room) {
  const int m = p.m;
  const Index r = p.r;
  const double *w = p.table, *gain = p.gain;
  double *matrix = room, *y = room + Index(m) * m;
  Index singular = 0;
  for (Index block = begin; block < end; ++block) {
    const Float* u = all + block * m * r;
    const double *null = p.null + block * m * m, *rest = p.rest + block * m;
    for (int a = 0; a < m; a += kStrip) {
      if (m - a >= 4) gram_strip<4>(u, a, m, r, w, matrix);
      if (m - a == 3) gram_strip<3>(u, a, m, r, w, matrix);
      if (m - a == 2) gram_strip<2>(u, a, m, r, w, matrix);
      if (m - a == 1) gram_strip<1>(u, a, m, r, w, matrix);
    }
    for (int a = 0; a < m; ++a) {
      Vector total = {};
      Index l = 0;
      for (; l + kLanes <= r; l += kLanes) total += load(u + a * r + l) * at(gain + l);
      double h = sum(total);
      for (; l < r; ++l) h += double(u[a * r + l]) * gain[l];
      y[a] = h + p.scale->re * rest[a];
      for (int b = a; b < m; ++b) {
        const double value = matrix[a * m + b];
        matrix[a * m + b] = value + p.scale->re * null[a * m + b];
        if (b > a) matrix[b * m + a] = value + p.scale->re * null[b * m + a];
      }
    }
    singular += !solve(matrix, y, m);
    for (int a = 0; a < m; ++a) p.v[block * m + a] = y[a];
    double* coef = p.coef + block * r;
    for (int a = 0; a < m; a += kStrip) {
      const Float* rows = u + a * r;
      if (m - a >= 4) tile_coef<4>(rows, r, w, y + a, a == 0, coef);
      if (m - a == 3) tile_coef<3>(rows, r, w, y + a, a == 0, coef);
      if (m - a == 2) tile_coef<2>(rows, r, w, y + a, a == 0, coef);
      if (m - a == 1) tile_coef<1>(rows, r, w, y + a, a == 0, coef);
    }
    if (m == 0)
      for (Index l = 0; l < r; ++l) coef[l] = 0;
  }
  return singular;
}

// Rational form -----------------------------------------------------------------------------------------------------

// Weights of the table rows in coef; whether the block could be solved.
bool solve_block(const Removal& p, Index block, const double* moments, double* weights, double* offsets,
                 const Group& group) {
  const int m = p.m;
  const double *null = p.null + block * m * m, *rest = p.rest + block * m;
  bool solved = true;
  for (int a = 0; a < m; ++a) offsets[a] = p.constant * p.r0[block * m + a];
  for (int q = 0; q < p.columns / 2; ++q) {
    solved &= solve_removed(moments, p.columns, 2 * q, m, null, rest, p.scale[q], group.matrix, group.y);
    for (int a = 0; a < m; ++a) {
      const Complex weight = multiply(p.residues[q], group.y[a]);
      weights[Index(a) * p.columns + 2 * q] = weight.re;
      weights[Index(a) * p.columns + 2 * q + 1] = -weight.im;
    }
  }
  return solved;
}

void write_coef(const Removal& p, Rows rows, Index first, Index blocks, Index begin, Index count, const Group& group) {
  constexpr Index step = kVectors * kLanes;
  const bool direct = p.m == 1 && in_place(p, blocks);
  double* out = direct ? p.coef + first * p.r + begin : group.rows;
  const Index stride = direct ? p.r : kChunk;
  for (Index row = 0; row < blocks * p.m; row += kTile) {
    const double *weights = group.weights + row * p.columns, *offsets = group.offsets + row;
    double* to = out + row * stride;
    Rows from{rows[row], rows.stride};
    const double* table = p.table + begin;
    Index l = 0;
    for (; l + step <= count; l += step, from.begin += step, table += step)
      tile_back<kVectors>(from, table, p.width, weights, offsets, p.columns, to + l, stride);
    for (; l < count; l += kLanes, from.begin += kLanes, table += kLanes)
      tile_back<1>(from, table, p.width, weights, offsets, p.columns, to + l, stride);
  }
  if (direct) return;
  const Index live = p.r - begin < count ? p.r - begin : count;
  for (Index block = 0; block < blocks; ++block) {
    double* to = p.coef + (first + block) * p.r + begin;
    const double* from = group.rows + block * p.m * kChunk;
    for (Index l = 0; l < live; ++l) to[l] = p.m ? from[l] : 0;
    for (int a = 1; a < p.m; ++a)
      for (Index l = 0; l < live; ++l) to[l] += from[a * kChunk + l];
  }
}

Index scratch(const Removal& p) {
  return p.residues ? lay_out(p, nullptr, nullptr) : round_up(Index(p.m) * p.m + p.m, kAlign);
}

Index run(const Removal& p, Index begin, Index end, double* room) {
  if (!p.residues && p.single) return run_real(p, static_cast<const float*>(p.u), begin, end, room);
  if (!p.residues) return run_real(p, static_cast<const double*>(p.u), begin, end, room);
  Group group;
  const Index size = lay_out(p, room, &group), most = group_blocks(p);
  for (Index i = 0; i < size; ++i) room[i] = 0;  // rows that only fill a tile stay zero
  Index singular = 0;
  for (Index first = begin; first < end; first += most) {
    const Index blocks = end - first < most ? end - first : most, rows = blocks * p.m;
    for (Index i = 0; i < blocks * features(p.m) * p.columns; ++i) group.moments[i] = 0;
    for (Index l = 0; l < p.width; l += kChunk) {
      const Index count = p.width - l < kChunk ? p.width - l : kChunk;
      add_moments(p, rows_of(p, first, rows, l, count, group), blocks, l, count, group);
    }
    for (Index block = 0; block < blocks; ++block)
      singular += !solve_block(p, first + block, group.moments + block * features(p.m) * p.columns,
                               group.weights + block * p.m * p.columns, group.offsets + block * p.m, group);
    for (Index l = 0; l < p.width; l += kChunk) {
      const Index count = p.width - l < kChunk ? p.width - l : kChunk;
      write_coef(p, rows_of(p, first, rows, l, count, group), first, blocks, l, count, group);
    }
  }
  return singular;
}

}  // namespace

extern const Kernels SUI_JOIN(kernels_, SUI_VARIANT);
const Kernels SUI_JOIN(kernels_, SUI_VARIANT) = {scratch, run};

}  // namespace sui
