// Choice of the instruction set, threads and room for csrc/cpu/rows_kernels.cpp.
#include "rows.h"

#include "variant.h"

namespace sui {

extern const RowKernels<float> rows_float_baseline;
extern const RowKernels<double> rows_double_baseline;
#if SUI_X86
extern const RowKernels<float> rows_float_avx2, rows_float_avx512;
extern const RowKernels<double> rows_double_avx2, rows_double_avx512;
constexpr Variants<RowKernels<float>> kFloat{&rows_float_baseline, &rows_float_avx2, &rows_float_avx512};
constexpr Variants<RowKernels<double>> kDouble{&rows_double_baseline, &rows_double_avx2, &rows_double_avx512};
#else
constexpr Variants<RowKernels<float>> kFloat{&rows_float_baseline, nullptr, nullptr};
constexpr Variants<RowKernels<double>> kDouble{&rows_double_baseline, nullptr, nullptr};
#endif

template <>
const RowKernels<float>& row_kernels() {
  return choose(kFloat);
}
template <>
const RowKernels<double>& row_kernels() {
  return choose(kDouble);
}

template <class T>
void count_sketch(const T* x, Index rows, Index length, const int* place, Index rank, T* out, int threads) {
  const double work = double(rows) * double(length + rank / 8);
  in_parts(rows, parts_for(rows, work, threads), [&](Index, Index begin, Index end) {
    row_kernels<T>().count_sketch(x + begin * length, end - begin, length, place, rank, out + begin * rank);
  });
}

template <class T>
void multiply_sum(const T* left, const T* right, Index samples, Index k, Index s, Index width, T* out, int threads) {
  const double work = double(samples) * double(k) * double(s) * double(width);
  in_parts(samples, parts_for(samples, work, threads), [&](Index, Index begin, Index end) {
    row_kernels<T>().multiply_sum(left + 2 * begin * s * width, right + 2 * begin * k * s * width, end - begin, k, s,
                                  width, out + 2 * begin * k * width);
  });
}

template <class T>
void sjlt(const Stream& stream, const T* x, Index rows, Index begin, Index length, Index pitch, Index rank, T* out,
          int threads) {
  // every part takes rows of its own: the hash is drawn again in each, which costs less than sums that meet
  const Index groups = (rows + kGroup - 1) / kGroup, parts = parts_for(groups, double(rows) * double(length), threads);
  const Index width = kGroup * rank;
  std::vector<T> room(static_cast<std::size_t>(parts * width));
  in_parts(groups, parts, [&](Index part, Index from, Index to) {
    for (Index group = from; group < to; ++group) {
      const Index first = group * kGroup, count = std::min(kGroup, rows - first);
      row_kernels<T>().sjlt(stream, x + first * pitch, count, begin, length, pitch, rank, room.data() + part * width,
                            out + first * rank);
    }
  });
}

#define SUI_FOR(T)                                                                                                   \
  template void count_sketch(const T*, Index, Index, const int*, Index, T*, int);                                    \
  template void multiply_sum(const T*, const T*, Index, Index, Index, Index, T*, int);                               \
  template void sjlt(const Stream&, const T*, Index, Index, Index, Index, Index, T*, int)
SUI_FOR(float);
SUI_FOR(double);

}  // namespace sui
