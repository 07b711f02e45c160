// Choice of the instruction set, threads and room for csrc/cpu/windows_kernels.cpp.
#include "windows.h"

#include <memory>

#include "tensor.h"
#include "variant.h"

namespace sui {

SUI_TYPED_VARIANTS(WindowKernels, windows, window_kernels)

template <class T>
Index parts_of(const Windows<T>& w, Index samples, Index width, int threads) {
  const double work = double(samples) * double(w.k) * double(w.s) * double(w.i) * double(width) / kWidth;
  return parts_for(samples, work, threads);
}

template <class T>
void fold_windows(const Windows<T>& windows, const Folding<T>& folding, Index samples, T* out, int threads) {
  const auto& kernels = window_kernels<T>();
  in_parts(samples, parts_of(windows, samples, folding.width, threads), [&](Index, Index begin, Index end) {
    const Index count = kernels.room(windows, folding.width, folding.rank);
    const std::unique_ptr<T[]> room(new T[static_cast<std::size_t>(count)]);
    kernels.fold(windows, folding, begin, end, room.get(), out);
  });
}

template <class T>
void scatter_windows(const Windows<T>& windows, Index samples, Index width, const int* place_o, const T* sign_o,
                     const int* place_i, const T* sign_i, Index rank, T* out, int threads) {
  const auto& kernels = window_kernels<T>();
  const auto& scatter = tensor_kernels<T>();
  in_parts(samples, parts_of(windows, samples, width, threads), [&](Index, Index begin, Index end) {
    // as many samples at a time as the scatter has lanes
    const Index step = (scatter.lanes + windows.k - 1) / windows.k, count = kernels.room(windows, width, 0);
    const Index all = count + step * windows.k * windows.i * width + 2 * rank * scatter.lanes;
    const std::unique_ptr<T[]> room(new T[static_cast<std::size_t>(all)]);
    T *const rows = room.get() + count, *const sums = rows + step * windows.k * windows.i * width;
    for (; begin < end; begin += step) {
      const Index stop = begin + step < end ? begin + step : end;
      kernels.rows(windows, begin, stop, width, room.get(), rows);
      scatter.scatter(rows, (stop - begin) * windows.k, windows.i, width, place_i, sign_i, place_o, sign_o, rank, sums,
                      out + begin * windows.k * rank);
    }
  });
}

#define SUI_FOR(T)                                                                                               \
  template void fold_windows(const Windows<T>&, const Folding<T>&, Index, T*, int);                              \
  template void scatter_windows(const Windows<T>&, Index, Index, const int*, const T*, const int*, const T*, Index, \
                                T*, int)
SUI_FOR(float);
SUI_FOR(double);

}  // namespace sui
