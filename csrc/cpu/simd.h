// Vectors of the instruction set an object is compiled for. Only for kernel files: everything has internal linkage.
#pragma once

#include "sizes.h"
#include "sui/scalar.h"

#define SUI_JOIN_(a, b) a##b
#define SUI_JOIN(a, b) SUI_JOIN_(a, b)

namespace sui {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T>
struct Simd {
  static constexpr int lanes = kBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
SUI_FN Vector<T>& at(T* p) {
  return *reinterpret_cast<Vector<T>*>(p);
}
template <class T>
SUI_FN const Vector<T>& at(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

// lanes x lanes entries, in place: blocks of H x H are exchanged, then of 2H x 2H.
template <class T, int H = 1>
SUI_FN void transpose(Vector<T>* v) {
  constexpr int lanes = Simd<T>::lanes;
  if constexpr (H < lanes) {
    decltype(v[0] == v[0]) low, high;
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) {
      const bool second = (l / H) & 1;
      low[l] = second ? lanes + l - H : l;
      high[l] = second ? lanes + l : l + H;
    }
#pragma GCC unroll 8
    for (int pair = 0; pair < lanes / 2; ++pair) {
      const int l = pair / H * 2 * H + pair % H;
      const Vector<T> x = v[l], y = v[l + H];
      v[l] = __builtin_shuffle(x, y, low);
      v[l + H] = __builtin_shuffle(x, y, high);
    }
    transpose<T, 2 * H>(v);
  }
}

}  // namespace
}  // namespace sui
