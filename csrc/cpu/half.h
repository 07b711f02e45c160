// Numbers that are read as they lie: T itself, or bfloat16 where T is float. Only for kernel files.
#pragma once

#include "simd.h"

namespace sui {
namespace {

template <class T>
SUI_FN Vector<T> load(const T* p) {
  return at(p);
}
struct Bfloat16 {
  unsigned short bits;
};
SUI_FN Vector<float> load(const Bfloat16* p) {
  typedef unsigned short Half __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));
  typedef unsigned Whole __attribute__((vector_size(kBytes)));
  return (Vector<float>)(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Whole) << 16);
}
template <class T>
SUI_FN T one(const T* p) {
  return *p;
}
SUI_FN float one(const Bfloat16* p) {
  const unsigned bits = static_cast<unsigned>(p->bits) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

}  // namespace
}  // namespace sui
