"""The arithmetic that C++ and CUDA share (csrc/include/sui), compiled as plain C++ and called through ctypes."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CXX = shutil.which("g++")
INCLUDE = Path(__file__).parents[2] / "csrc" / "include"
SOURCE = """
#include <new>
#include "../cpu/variant.h"
#include "sui/philox.h"
#include "sui/resolvent.h"
extern "C" {
void philox(unsigned long long index, unsigned word, unsigned stream, unsigned long long seed, unsigned* out) {
  const sui::Philox four = sui::philox(index, word, stream, seed);
  out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
}
unsigned bucket(unsigned word, unsigned buckets) { return sui::bucket(word, buckets); }
int solve_real(double* matrix, double* x, int m) { return sui::solve(matrix, x, m); }
int solve_complex(sui::Complex* matrix, sui::Complex* x, int m) { return sui::solve(matrix, x, m); }
int count_in_parts(int* seen, int items, int parts, int bad) {
  try {
    sui::in_parts(items, parts, [&](sui::Index part, sui::Index begin, sui::Index end) {
      if (part == bad) throw std::bad_alloc();
      for (; begin < end; ++begin) ++seen[begin];
    });
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
void invert(sui::Complex* x) { *x = sui::inverse(*x); }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if CXX is None:
        pytest.skip("no g++ on this machine")
    folder = tmp_path_factory.mktemp("headers")
    (folder / "all.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-shared", "-fPIC", "-pthread"]
    subprocess.run([CXX, *flags, f"-I{INCLUDE}", folder / "all.cpp", "-o", folder / "all.so"], check=True)
    found = ctypes.CDLL(str(folder / "all.so"))
    found.philox.argtypes = [ctypes.c_ulonglong, ctypes.c_uint, ctypes.c_uint, ctypes.c_ulonglong, ctypes.c_void_p]
    found.bucket.restype = ctypes.c_uint
    return found


@pytest.mark.parametrize(
    "counter, key, words",  # known answers of Random123
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(library, counter, key, words):
    out = (ctypes.c_uint * 4)()
    library.philox(counter[0] | counter[1] << 32, counter[2], counter[3], key, out)
    assert tuple(out) == words


@pytest.mark.parametrize("buckets", [1, 7, 4096, 2**31])
def test_buckets_stay_in_range(library, buckets):
    found = [library.bucket(ctypes.c_uint(word), ctypes.c_uint(buckets)) for word in (0, 1, 2**31, 2**32 - 1)]
    assert found[0] == 0 and found[-1] == buckets - 1 and found == sorted(found)


@pytest.mark.parametrize("kind", [np.float64, np.complex128])
@pytest.mark.parametrize("m", [1, 2, 5, 32])
def test_solve(library, m, kind):
    rng = np.random.default_rng(m)
    draw = lambda *shape: rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if kind is np.complex128 else 0)  # noqa: E731
    matrix, x = draw(m, m), draw(m)
    matrix[0, 0] = 0 if m > 1 else matrix[0, 0]  # a pivot must be looked for
    want = np.linalg.solve(matrix, x)
    solve = library.solve_complex if kind is np.complex128 else library.solve_real
    assert solve(matrix.ctypes.data_as(ctypes.c_void_p), x.ctypes.data_as(ctypes.c_void_p), m) == 1
    np.testing.assert_allclose(x, want, rtol=1e-9)
    for bad in (np.zeros((m, m), kind), np.full((m, m), np.nan, kind)):
        x = draw(m)
        assert solve(bad.ctypes.data_as(ctypes.c_void_p), x.ctypes.data_as(ctypes.c_void_p), m) == 0
        assert np.isnan(x).all()


@pytest.mark.parametrize("value", [3 + 4j, 1e-200 + 1e-200j, 1e200 - 1e200j, 5 + 0j, -2j])
def test_inverse_neither_overflows_nor_underflows(library, value):
    x = np.array([value])
    library.invert(x.ctypes.data_as(ctypes.c_void_p))
    assert abs(x[0] * value - 1) < 1e-14


@pytest.mark.parametrize("items, parts", [(0, 1), (1, 1), (7, 3), (64, 4)])
def test_parts_cover_every_item_once_and_hand_on_what_they_throw(library, items, parts):
    seen = np.zeros(items + 1, np.int32)
    where = seen.ctypes.data_as(ctypes.c_void_p)
    assert library.count_in_parts(where, items, parts, -1) == 0
    assert seen.tolist() == [1] * items + [0]
    for bad in range(parts):  # the caller's own thread and others: an exception of theirs would end the process
        seen[:] = 0
        assert library.count_in_parts(where, items, parts, bad) == 1
        assert seen.sum() == items - (items * (bad + 1) // parts - items * bad // parts)
