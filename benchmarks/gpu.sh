#!/usr/bin/env bash
# One call on a GPU machine without network: build, GPU-marked tests, parity of every kernel, timings, JSON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

echo "==> building the C++ module (optional)"
if $PY -c 'import pybind11' 2>/dev/null && command -v cmake >/dev/null; then
  cmake -S . -B build/gpu -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$($PY -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$($PY -m pybind11 --cmakedir)" -DSUI_OUTPUT_DIRECTORY="$PWD/sui_fast" >/dev/null \
    && cmake --build build/gpu >/dev/null || echo "    not built; PyTorch bodies run in its place"
else
  echo "    no pybind11 or cmake; PyTorch bodies run in its place"
fi

echo "==> GPU-marked tests"
$PY -m pytest -q -m gpu tests || echo "    (pytest missing or tests failed: see above)"

echo "==> parity and timings"
$PY benchmarks/gpu_table.py
