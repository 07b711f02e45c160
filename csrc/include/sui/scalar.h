// Real and complex numbers for code that the host compiler and NVRTC both compile: no standard library here.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define SUI_FN static __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Internal linkage and always inlined: every object may be compiled for another instruction set, and none may lend its
// copy of a function to the others.
#define SUI_FN static inline __attribute__((always_inline, unused))
#else
#define SUI_FN static inline
#endif

namespace sui {

struct Complex {
  double re, im;
};

// magnitude: a cheap norm to choose pivots by, not the modulus.
SUI_FN double magnitude(double x) { return x < 0 ? -x : x; }
SUI_FN double magnitude(Complex x) { return magnitude(x.re) + magnitude(x.im); }

SUI_FN double multiply(double x, double y) { return x * y; }
SUI_FN Complex multiply(Complex x, Complex y) { return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re}; }

SUI_FN double scaled(double x, double factor) { return x * factor; }
SUI_FN Complex scaled(Complex x, double factor) { return {x.re * factor, x.im * factor}; }

SUI_FN double add(double x, double y) { return x + y; }
SUI_FN Complex add(Complex x, Complex y) { return {x.re + y.re, x.im + y.im}; }

SUI_FN double subtract(double x, double y) { return x - y; }
SUI_FN Complex subtract(Complex x, Complex y) { return {x.re - y.re, x.im - y.im}; }

// 1 / x; complex by Smith's method, which neither overflows nor underflows where the result does not.
SUI_FN double inverse(double x) { return 1 / x; }
SUI_FN Complex inverse(Complex x) {
  if (magnitude(x.re) >= magnitude(x.im)) {
    const double ratio = x.im / x.re, size = 1 / (x.re + x.im * ratio);
    return {size, -ratio * size};
  }
  const double ratio = x.re / x.im, size = 1 / (x.re * ratio + x.im);
  return {ratio * size, -size};
}

// The number stored at `at`: one double, or the pair (re, im).
SUI_FN void load(const double* at, double& x) { x = at[0]; }
SUI_FN void load(const double* at, Complex& x) { x = {at[0], at[1]}; }

}  // namespace sui
