// The only file that knows Python: addresses and sizes in, the GIL let go.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "removal.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "C++ kernels of sui_fast. Arguments are addresses of dense float64 arrays (u: float32 where `single`).";
  module.attr("MOST_ROWS") = sui::kMostRows;
  module.def("instruction_set", &sui::instruction_set);
  module.def(
      "converged_removal",
      [](Address u, bool single, sui::Index blocks, int m, sui::Index r, Address s, Address g, Address rest,
         Address null, double shift, Address v, Address coef, int threads) {
        return sui::converged_removal(at<void>(u), single, blocks, m, r, at<double>(s), at<double>(g), at<double>(rest),
                                      at<double>(null), shift, at<double>(v), at<double>(coef), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "rational_removal",
      [](Address u, bool single, sui::Index blocks, int m, sui::Index r, Address s, Address g, Address rest,
         Address null, Address r0, int count, Address poles, Address residues, double constant, Address coef,
         int threads) {
        return sui::rational_removal(at<void>(u), single, blocks, m, r, at<double>(s), at<double>(g), at<double>(rest),
                                     at<double>(null), at<double>(r0), count, at<sui::Complex>(poles),
                                     at<sui::Complex>(residues), constant, at<double>(coef), threads);
      },
      py::call_guard<py::gil_scoped_release>());
}
