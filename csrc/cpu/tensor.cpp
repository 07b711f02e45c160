// Choice of the instruction set, threads and room for csrc/cpu/tensor_kernels.cpp.
#include "tensor.h"

#include <cstdint>
#include <memory>

#include "variant.h"

namespace sui {

SUI_TYPED_VARIANTS(TensorKernels, tensor, tensor_kernels)

// Numbers for each part, from a cache line on.
template <class T>
class Rooms {
 public:
  Rooms(Index parts, Index count)
      : count_((count + kLine - 1) / kLine * kLine), held_(new T[static_cast<std::size_t>(parts * count_ + kLine)]) {
    const auto address = reinterpret_cast<std::uintptr_t>(held_.get());
    first_ = held_.get() + (64 - address % 64) % 64 / sizeof(T);
  }
  T* operator[](Index part) const { return first_ + part * count_; }

 private:
  static constexpr Index kLine = 64 / sizeof(T);
  Index count_;
  std::unique_ptr<T[]> held_;  // not zeroed
  T* first_;
};

template <class T>
void fourier(const Layer<T>* layers, Index count, Index samples, Index k, Index s, Index rank, Index length, T* out,
             int threads) {
  const auto& kernels = tensor_kernels<T>();
  const double work = 20.0 * double(count) * double(samples) * double(k) * double(s) * double(rank);
  const Index parts = parts_for(samples, work, threads);
  const Rooms<T> rooms(parts, kernels.fourier_room(rank));
  in_parts(samples, parts, [&](Index part, Index begin, Index end) {
    kernels.fourier(layers, count, begin, end, k, s, rank, length, rooms[part], out);
  });
}

template <class T>
void flat(const Layer<T>* layers, Index count, Index samples, Index rank, Index length, T* out, int threads) {
  const auto& kernels = tensor_kernels<T>();
  const Index parts = parts_for(samples, 20.0 * double(count) * double(samples) * double(length), threads);
  const Rooms<T> rooms(parts, kernels.fourier_room(length));
  in_parts(samples, parts, [&](Index part, Index begin, Index end) {
    kernels.flat(layers, count, begin, end, rank, length, rooms[part], out);
  });
}

template <class T>
void finish(const T* sums, Index rows, Index rank, Index length, T* out, int threads) {
  const auto& kernels = tensor_kernels<T>();
  const Index parts = parts_for(rows, 20.0 * double(rows) * double(rank), threads);
  const Rooms<T> rooms(parts, rank * kernels.lanes);
  in_parts(rows, parts, [&](Index part, Index begin, Index end) {
    kernels.finish(sums + begin * rank, end - begin, rank, length, rooms[part], out + begin * rank);
  });
}

// Entry by entry: less work than the places of a row where few entries go to them.
template <class T>
void scatter_few(const T* x, Index rows, Index o, Index i, const int* place_o, const T* sign_o, const int* place_i,
                 const T* sign_i, Index rank, T* out) {
  for (Index row = 0; row < rows; ++row, out += rank) {
    for (Index q = 0; q < o; ++q, x += i) {
      for (Index j = 0; j < i; ++j) {
        const Index place = Index(place_o[q]) + place_i[j];
        out[place < rank ? place : place - rank] += sign_o[q] * sign_i[j] * x[j];
      }
    }
  }
}

template <class T>
void scatter_rows(const T* x, Index rows, Index o, Index i, const int* place_o, const T* sign_o, const int* place_i,
                  const T* sign_i, Index rank, T* out, int threads) {
  if (4 * o * i <= rank) return scatter_few(x, rows, o, i, place_o, sign_o, place_i, sign_i, rank, out);
  const auto& kernels = tensor_kernels<T>();
  const Index parts = parts_for(rows, double(rows) * double(o) * double(i), threads);
  const Rooms<T> rooms(parts, 2 * rank * kernels.lanes);
  in_parts(rows, parts, [&](Index part, Index begin, Index end) {
    kernels.scatter(x + begin * o * i, end - begin, o, i, place_o, sign_o, place_i, sign_i, rank,
                    rooms[part], out + begin * rank);
  });
}

template <class T>
void scatter_index(const T* g, Index samples, Index k, Index s, Index o, const Index* token, const int* place_token,
                   const T* sign_token, const int* place, const T* sign, Index rank, T* out, int threads) {
  const Index parts = parts_for(samples, double(samples) * double(k) * double(s) * double(o), threads);
  const Rooms<T> rooms(parts, 2 * rank);
  in_parts(samples, parts, [&](Index part, Index begin, Index end) {
    tensor_kernels<T>().index(g + begin * k * s * o, end - begin, k, s, o, token + begin * s, place_token, sign_token,
                              place, sign, rank, rooms[part], out + begin * k * rank);
  });
}

#define SUI_FOR(T)                                                                                                   \
  template void fourier(const Layer<T>*, Index, Index, Index, Index, Index, Index, T*, int);                         \
  template void flat(const Layer<T>*, Index, Index, Index, Index, T*, int);                                          \
  template void finish(const T*, Index, Index, Index, T*, int);                                                      \
  template void scatter_rows(const T*, Index, Index, Index, const int*, const T*, const int*, const T*, Index, T*,    \
                             int);                                                                                   \
  template void scatter_index(const T*, Index, Index, Index, Index, const Index*, const int*, const T*, const int*,  \
                              const T*, Index, T*, int)
SUI_FOR(float);
SUI_FOR(double);

}  // namespace sui
