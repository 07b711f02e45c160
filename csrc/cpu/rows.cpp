// Choice of the instruction set, threads and room for csrc/cpu/rows_kernels.cpp.
#include "rows.h"

#include "variant.h"

namespace sui {

SUI_TYPED_VARIANTS(RowKernels, rows, row_kernels)

template <class T>
void sjlt(const Stream& stream, const T* x, Index rows, Index begin, Index length, Index pitch, Index rank, T* out,
          int threads) {
  // every part takes rows of its own: the hash is drawn again in each, which costs less than sums that meet
  const Index fit = kGroupRoom / (Index(sizeof(T)) * std::max<Index>(1, rank)) / kLeastGroup * kLeastGroup;
  const Index size = std::min(std::max(fit, kLeastGroup), kMostGroup);
  const Index groups = (rows + size - 1) / size, parts = parts_for(groups, double(rows) * double(length), threads);
  const Index width = size * rank;
  std::vector<T> room(static_cast<std::size_t>(parts * width));
  in_parts(groups, parts, [&](Index part, Index from, Index to) {
    for (Index group = from; group < to; ++group) {
      const Index first = group * size, count = std::min(size, rows - first);
      row_kernels<T>().sjlt(stream, x + first * pitch, count, begin, length, pitch, rank, room.data() + part * width,
                            out + first * rank);
    }
  });
}

#define SUI_FOR(T)                                                                                                   \
  template void sjlt(const Stream&, const T*, Index, Index, Index, Index, Index, T*, int)
SUI_FOR(float);
SUI_FOR(double);

}  // namespace sui
