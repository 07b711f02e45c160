// The only file that knows Python: addresses and sizes in, the GIL let go.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "removal.h"
#include "results.h"
#include "rows.h"
#include "tensor.h"
#include "triangular.h"
#include "variant.h"
#include "windows.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using sui::Index;

// name_float32, name_float64
template <class T>
void define_rows(py::module_& module, const char* type) {
  const auto define = [&](const char* name, const auto& function, const auto&... more) {
    module.def((std::string(name) + "_" + type).c_str(), function, more...);
  };
  const py::call_guard<py::gil_scoped_release> release;
  define("write_rows", [](Address pieces, Index count, Index first, Index samples, Index k, Address out, Index pitch) {
    sui::row_kernels<T>().write(at<sui::Piece<T>>(pieces), count, first, samples, k, at<T>(out), pitch);
  });  // a step takes microseconds: the GIL is kept
  define("hash", [](unsigned word, unsigned stream, unsigned long long seed, Index begin, Index count, Index buckets,
                    Address place, Address sign) {
    sui::row_kernels<T>().hash({word, stream, seed}, begin, count, buckets, at<int>(place), at<T>(sign));
  }, release);
  define("signs", [](unsigned word, unsigned stream, unsigned long long seed, Index begin, Index rows, Index columns,
                     double size, Address out) {
    sui::row_kernels<T>().signs({word, stream, seed}, begin, rows, columns, static_cast<T>(size), at<T>(out));
  }, release);
  define("sjlt", [](unsigned word, unsigned stream, unsigned long long seed, Address x, Index rows, Index begin,
                    Index length, Index pitch, Index rank, Address out, int threads) {
    sui::sjlt({word, stream, seed}, at<const T>(x), rows, begin, length, pitch, rank, at<T>(out), threads);
  }, release);
  // a side: [address, bfloat16, four strides, length, ones, places, signs]
  using Numbers = std::array<std::int64_t, 10>;
  constexpr auto side = [](const Numbers& x) {
    return sui::Side<T>{at<void>(Address(x[0])), x[1] ? sui::Kind::bfloat16 : sui::Kind::real, x[2], x[3], x[4], x[5],
                        x[6], x[7] != 0, at<const int>(Address(x[8])), at<const T>(Address(x[9]))};
  };
  define("fourier", [side](const std::vector<std::tuple<Numbers, Numbers, int>>& sides, Index samples, Index k,
                           Index s, Index rank, Index length, Address out, int threads) {
    std::vector<sui::Layer<T>> layers;
    for (const auto& [a, g, ring] : sides) layers.push_back({side(a), side(g), ring});
    sui::fourier(layers.data(), Index(layers.size()), samples, k, s, rank, length, at<T>(out), threads);
  }, release);
  define("fourier_finish", [](Address sums, Index rows, Index rank, Index length, Address out, int threads) {
    sui::finish(at<const T>(sums), rows, rank, length, at<T>(out), threads);
  }, release);
  define("scatter_rows", [](Address x, Index rows, Index o, Index i, Address place_o, Address sign_o, Address place_i,
                            Address sign_i, Index rank, Address out, int threads) {
    sui::scatter_rows(at<const T>(x), rows, o, i, at<int>(place_o), at<const T>(sign_o), at<int>(place_i),
                      at<const T>(sign_i), rank, at<T>(out), threads);
  }, release);
  // windows: [x, bfloat16, five strides, channels, three sizes, three paddings, three padded sizes, planes, signs, g,
  // bfloat16, k, s, i, o, base, offset]
  using Geometry = std::array<std::int64_t, 27>;
  constexpr auto windows = [](const Geometry& v) {
    return sui::Windows<T>{
        at<void>(Address(v[0])), v[1] ? sui::Kind::bfloat16 : sui::Kind::real, v[2], v[3], {v[4], v[5], v[6]},
        v[7], {v[8], v[9], v[10]}, {v[11], v[12], v[13]}, {v[14], v[15], v[16]},
        v[17], at<const T>(Address(v[18])),
        at<void>(Address(v[19])), v[20] ? sui::Kind::bfloat16 : sui::Kind::real, v[21], v[22], v[23], v[24],
        at<const int>(Address(v[25])), at<const int>(Address(v[26]))};
  };
  // told: three numbers a layer, the addresses of what is known of it, of x and of g. Known: 0 and two sides, or 1,
  // windows, width, ones, places, signs of i, signs of o.
  define("layers", [side, windows](const std::vector<std::int64_t>& told, Index samples, Index rank, Index length,
                                   Address out, const std::vector<Index>& to, double factor, Address table,
                                   int threads) {
    std::vector<sui::Layer<T>> flat;
    for (std::size_t layer = 0; layer < told.size(); layer += 3) {
      const auto* known = at<const std::int64_t>(Address(told[layer]));
      if (*known++ == 0) {
        Numbers a, g;
        std::copy(known, known + 10, a.begin());
        std::copy(known + 10, known + 20, g.begin());
        a[0] = told[layer + 1], g[0] = told[layer + 2];
        flat.push_back({side(a), side(g)});
      } else {
        Geometry geometry;
        std::copy(known, known + 27, geometry.begin());
        geometry[0] = told[layer + 1], geometry[19] = told[layer + 2];
        const sui::Folding<T> folding{known[27], rank, known[28] != 0, at<const int>(Address(known[29])),
                                      at<const T>(Address(known[30])), at<const T>(Address(known[31]))};
        sui::fold_windows(windows(geometry), folding, samples, at<T>(out), threads);
      }
    }
    if (!flat.empty())
      sui::flat(flat.data(), Index(flat.size()), samples, rank, length, at<T>(out), threads);
    return !table || sui::tensor_kernels<T>().keep(at<const T>(out), samples, rank, static_cast<T>(factor), to.data(),
                                                   at<T>(table));
  }, release);
  define("scatter_windows", [windows](const Geometry& geometry, Index samples, Index width, Address place_o,
                                      Address sign_o, Address place_i, Address sign_i, Index rank, Address out,
                                      int threads) {
    sui::scatter_windows(windows(geometry), samples, width, at<const int>(place_o), at<const T>(sign_o),
                         at<const int>(place_i), at<const T>(sign_i), rank, at<T>(out), threads);
  }, release);
  define("scatter_index", [](Address g, Index samples, Index k, Index s, Index o, Address token, Address place_token,
                             Address sign_token, Address place, Address sign, Index rank, Address out, int threads) {
    sui::scatter_index(at<const T>(g), samples, k, s, o, at<const Index>(token), at<int>(place_token),
                       at<const T>(sign_token), at<int>(place), at<const T>(sign), rank, at<T>(out), threads);
  }, release);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() =
      "C++ kernels of sui_fast. Arguments are addresses of dense arrays (removal: float64, u float32 where `single`); "
      "word, stream and seed name the random numbers.";
  module.attr("MOST_ROWS") = sui::kMostRows;
  module.attr("WIDTH") = sui::kWidth;
  module.def("instruction_set", &sui::instruction_set);
  module.def("result", [](Index rows, Index columns) {
    void* memory = sui::take_result(rows * columns * Index(sizeof(double)));
    if (!memory) throw std::bad_alloc();
    return py::array_t<double>({rows, columns}, static_cast<double*>(memory), py::capsule(memory, sui::return_result));
  });
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
  module.def(
      "rational_sums",
      [](Address u, sui::Index blocks, int m, sui::Index r, Address s, Address g, Address r0, bool outside, Address rest,
         Address null, int count, Address poles, Address residues, double constant, Address base, Address trained,
         Address c, sui::Index rows, Address reached, Address sqnorm, Address form, int threads) {
        return sui::rational_sums(at<double>(u), blocks, m, r, at<double>(s), at<double>(g), at<double>(r0), outside,
                                  at<double>(rest), at<double>(null), count, at<sui::Complex>(poles),
                                  at<sui::Complex>(residues), constant, at<double>(base), at<double>(trained),
                                  at<double>(c), rows, at<double>(reached), at<double>(sqnorm), at<double>(form), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "triangular_sqnorm",
      [](Address c, sui::Index p, sui::Index r, Address x, sui::Index count, Address out, int threads) {
        sui::triangular_sqnorm(at<double>(c), p, r, at<double>(x), count, at<double>(out), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  // a, m, base: [address, rows, numbers from row to row]
  using Strided = std::tuple<Address, Index, Index>;
  module.def(
      "product_sqnorm",
      [](const Strided& a, Index a_step, const Strided& m, Index m_step, const Strided& base, Index p, Index count,
         Address out, int threads) {
        const auto rows = [](const Strided& x) {
          return sui::Rows{at<const double>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)};
        };
        sui::product_sqnorm(rows(a), a_step, rows(m), m_step, rows(base), p, count, at<double>(out), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  define_rows<float>(module, "float32");
  define_rows<double>(module, "float64");
}
