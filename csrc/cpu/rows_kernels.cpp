// Rows written out, hashed and transformed; compiled once per instruction set (see CMakeLists.txt), therefore without the
// standard library: an inline function shared between the objects would let the linker put AVX-512 code into the baseline.
#include "rows.h"

#include "simd.h"
#include "sui/philox.h"

namespace sui {
namespace {

constexpr Index kAhead = 8;  // vectors by which loads are announced: more rows than the processor follows by itself
constexpr Index kTile = 1024;  // entries hashed at a time: places and signs stay in the first cache

// Places and signs of indices begin .. begin + count. Counters are consecutive, so the compiler does as many at once as
// a vector holds; each serves four indices.
template <class T>
void hash_tile(const Stream& from, Index begin, Index count, Index buckets, int* place, T* sign) {
  unsigned words[kTile + 4];
  for (Index done = 0; done < count; done += kTile) {
    const Index first = (begin + done) / 4, skip = (begin + done) % 4, live = count - done < kTile ? count - done : kTile;
    for (Index e = 0; e < (live + skip + 3) / 4; ++e) {
      const Philox four = philox(static_cast<unsigned long long>(first + e), from.word, from.stream, from.seed);
      words[4 * e] = four.x;
      words[4 * e + 1] = four.y;
      words[4 * e + 2] = four.z;
      words[4 * e + 3] = four.w;
    }
    for (Index e = 0; e < live; ++e) {
      place[done + e] = static_cast<int>(bucket(words[skip + e], static_cast<unsigned>(buckets)));
      sign[done + e] = words[skip + e] & 1u ? T(-1) : T(1);
    }
  }
}

// Rows -------------------------------------------------------------------------------------------------------------

template <class T>
void write_rows(const Piece<T>* pieces, Index count, Index first, Index samples, Index k, T* out, Index pitch) {
  for (Index n = first; n < first + samples; ++n) {
    for (Index c = 0; c < k; ++c, out += pitch) {
      for (Index p = 0; p < count; ++p) {
        const Piece<T>& piece = pieces[p];
        const T* g = piece.g + (n * k + c) * piece.o;
        T* to = out + piece.column;
        if (!piece.a) {
          for (Index q = 0; q < piece.o; ++q) to[q] = g[q];
          continue;
        }
        const T* a = piece.a + n * piece.i;
        for (Index q = 0; q < piece.o; ++q, to += piece.i) {
          const T factor = g[q];
          for (Index l = 0; l < piece.i; ++l) to[l] = factor * a[l];
        }
      }
    }
  }
}

// Random tables ----------------------------------------------------------------------------------------------------

template <class T>
void sign_table(const Stream& from, Index begin, Index rows, Index columns, T size, T* out) {
  for (Index i = begin; i < begin + rows; ++i, out += columns) {
    for (Index j = 0; j < columns; j += 128) {
      const Philox words = philox(sign_index(static_cast<unsigned long long>(i), static_cast<unsigned long long>(j)),
                                  from.word, from.stream, from.seed);
      const unsigned bits[4] = {words.x, words.y, words.z, words.w};
      T values[128];
      for (unsigned part = 0; part < 4; ++part)
        for (unsigned b = 0; b < 32; ++b) values[32 * part + b] = (bits[part] >> b) & 1u ? -size : size;
      const Index live = columns - j < 128 ? columns - j : 128;
      for (Index b = 0; b < live; ++b) out[j + b] = values[b];
    }
  }
}

// Sparse sketch of formed rows -------------------------------------------------------------------------------------

// A vector holds one entry of as many rows as it has lanes, and one place of their sums: [rank, lanes] for each such group
// of rows. The rows that are left go one by one.
template <class T>
void sjlt_rows(const Stream& from, const T* x, Index rows, Index begin, Index length, Index pitch, Index rank, T* room,
             T* out) {
  constexpr int lanes = Simd<T>::lanes;
  const Index grouped = rows / lanes * lanes;
  for (Index b = 0; b < grouped * rank; ++b) room[b] = 0;
  int place[kTile];
  T sign[kTile];
  for (Index first = 0; first < length; first += kTile) {
    const Index count = length - first < kTile ? length - first : kTile;
    hash_tile(from, begin + first, count, rank, place, sign);
    for (Index row = 0; row < grouped; row += lanes) {
      const T* entries = x + row * pitch + first;
      T* sums = room + row * rank;
      Index e = 0;
      for (; e + lanes <= count; e += lanes) {
        Vector<T> v[lanes];
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) {
          v[l] = at(entries + l * pitch + e);
          __builtin_prefetch(entries + l * pitch + e + kAhead * lanes);
        }
        transpose<T>(v);
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) at(sums + Index(place[e + l]) * lanes) += v[l] * sign[e + l];
      }
      for (; e < count; ++e) {
        T* sum = sums + Index(place[e]) * lanes;
        for (int l = 0; l < lanes; ++l) sum[l] += entries[l * pitch + e] * sign[e];
      }
    }
    for (Index row = grouped; row < rows; ++row) {
      const T* entries = x + row * pitch + first;
      T* sums = out + row * rank;
      for (Index e = 0; e < count; ++e) sums[place[e]] += entries[e] * sign[e];
    }
  }
  for (Index row = 0; row < grouped; ++row) {
    const T* sums = room + row / lanes * lanes * rank + row % lanes;
    for (Index b = 0; b < rank; ++b) out[row * rank + b] += sums[b * lanes];
  }
}

}  // namespace

#define SUI_TABLE(T)                                                                                                \
  extern const RowKernels<T> SUI_JOIN(rows_##T##_, SUI_VARIANT);                                                    \
  const RowKernels<T> SUI_JOIN(rows_##T##_, SUI_VARIANT) = {                                                        \
      write_rows<T>, hash_tile<T>, sign_table<T>, sjlt_rows<T>}
SUI_TABLE(float);
SUI_TABLE(double);

}  // namespace sui
