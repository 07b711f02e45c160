"""The CUDA kernels: compiled for two targets, emulated on the CPU, and run on a GPU if there is one.

The emulator (cuda_shim.h) compiles the same .cu files as C++ and stands in for the launcher, so the functions of
_cuda.py run whole: tables, sizes of shared memory, grids and kernels.
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import sui_fast
from sui_fast import ops
from sui_fast.ops import _nvrtc
from sui_fast.ops.removal import _cuda as removal_kernels
from sui_fast.ops.sketching import _cuda as sketch_kernels

ROOT = Path(__file__).parents[2] / "csrc"
FILES = sorted((ROOT / "cuda").glob("*.cu"))
NVCC, CXX = shutil.which("nvcc"), shutil.which("g++")
KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\((.*?)\)\s*{', re.S)
TYPES = {"long long": ctypes.c_longlong, "unsigned long long": ctypes.c_ulonglong, "double": ctypes.c_double}


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_compiles_without_warnings_and_spills(path, target, tmp_path):
    command = [NVCC, f"-arch={target}", "--std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-I", ROOT / "include", "-c", path, "-o", tmp_path / "out.o"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)]
    assert len(spills) >= 4 and not any(spills), done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert max(registers) <= 128, done.stderr  # two blocks of 256 threads stay resident


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """launch() of _nvrtc, on the CPU."""
    if CXX is None:
        pytest.skip("no g++ on this machine")
    folder, libraries, signatures = tmp_path_factory.mktemp("shim"), {}, {}
    shim = Path(__file__).parent / "cuda_shim.h"
    for path in FILES:
        flat = subprocess.run(
            [CXX, "-std=c++17", "-E", "-P", "-x", "c++", "-I", ROOT / "include", path],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        text, dynamic = path.read_text(), "extern __shared__ double shared[];"
        assert dynamic in text
        driver = [f'#include "{shim}"', text.replace(dynamic, "double* shared = shim::shared_memory.data();")]
        for name, arguments in KERNEL.findall(flat):
            typed = [argument.strip().rsplit(" ", 1) for argument in arguments.split(",")]
            signatures[name] = [ctypes.c_void_p if "*" in kind else TYPES[kind] for kind, _ in typed]
            listed, named = ", ".join(" ".join(pair) for pair in typed), ", ".join(pair[1] for pair in typed)
            sizes = ("gx", "gy", "threads", "shared")
            driver.append(
                f'extern "C" void run_{name}({", ".join(f"long long {size}" for size in sizes)}, {listed}) '
                f"{{ shim::launch({', '.join(sizes)}, [=] {{ {name}({named}); }}); }}"
            )
        source, library = folder / f"{path.stem}.cpp", folder / f"{path.stem}.so"
        source.write_text("\n".join(driver))
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{ROOT / 'include'}"]
        done = subprocess.run([CXX, *flags, source, "-o", library], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        libraries[path.name] = ctypes.CDLL(str(library))

    def launch(file, name, grid, threads, shared, like, *args):
        assert like.is_contiguous() and threads <= 1024 and shared <= 96 * 1024
        gx, gy = (*grid, 1)[:2]
        assert 0 < gx < 2**31 and 0 < gy < 65536
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
        assert len(values) == len(signatures[name]), name
        typed = [kind(value) for kind, value in zip(signatures[name], values, strict=True)]
        sizes = [ctypes.c_longlong(x) for x in (gx, gy, threads, shared)]
        getattr(libraries[file], f"run_{name}")(*sizes, *typed)

    return launch


@pytest.fixture
def on_cpu(emulated, monkeypatch):
    monkeypatch.setattr(_nvrtc, "launch", emulated)
    fresh = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        out = fresh(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def draw(*shape, dtype=torch.float64):
    rng = np.random.default_rng(sum(shape))
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "n, k, s, i, o, rank, route",
    [
        (1, 1, 1, 1, 1, 2, "fft"),
        (2, 3, 5, 17, 9, 64, "fft"),
        (3, 1, 2, 33, 65, 2048, "fft"),
        (1, 1, 1, 1, 1, 1, "scatter"),
        (5, 2, 3, 7, 31, 65, "scatter"),
        (3, 3, 9, 5, 6, 17, "scatter"),
        (2, 1, 1, 63, 129, 1000, "auto"),
        (0, 2, 3, 4, 5, 8, "auto"),
        (2, 2, 0, 4, 5, 8, "auto"),
    ],
)
def test_tensor_sketch(on_cpu, n, k, s, i, o, rank, route, dtype):
    check_sketch(n, k, s, i, o, rank, "tensor", route, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n, k, s, i, o, rank",
    [(1, 1, 1, 1, 1, 1), (9, 1, 1, 1, 4099, 127), (3, 2, 3, 7, 31, 65), (5, 1, 9, 5, 6, 17), (0, 1, 1, 3, 4, 5)],
)
def test_sjlt(on_cpu, n, k, s, i, o, rank, dtype):
    check_sketch(n, k, s, i, o, rank, "sjlt", "auto", dtype)


def check_sketch(n, k, s, i, o, rank, kind, route, dtype, device="cpu"):
    a = draw(n + 1, i, s).to(dtype)[1:].transpose(1, 2).to(device)  # offset and strided
    g = draw(n, s, k, 2 * o).to(dtype)[..., ::2].transpose(1, 2).to(device)
    rest = (rank, 1 << 40, 3, kind, route)
    assert sketch_kernels.refuse_sketch(a, g, *rest) is None
    got, body = sketch_kernels.sketch(a, g, *rest), ops.sketch.op.body
    plain, exact = body(a, g, *rest), body(a.double(), g.double(), *rest)
    assert got.shape == plain.shape and got.dtype == plain.dtype
    if got.numel():
        size = float(exact.abs().max()) + 1e-300
        mine, theirs = (float((x - exact).abs().max()) / size for x in (got, plain))
        assert mine <= (1e-13 if dtype == torch.float64 else 2 * theirs + 16 * torch.finfo(got.dtype).eps)


def test_strips_of_a_formed_row(on_cpu, monkeypatch):
    monkeypatch.setattr(sketch_kernels, "_ELEMENTS", 40)
    for kind in ("tensor", "sjlt"):
        check_sketch(3, 2, 9, 5, 11, 33, kind, "scatter" if kind == "tensor" else "auto", torch.float64)


@pytest.mark.parametrize("single", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "blocks, m, r, poles", [(1, 1, 1, 1), (3, 1, 130, 5), (2, 3, 65, 7), (1, 10, 33, 4), (1, 32, 40, 2), (2, 2, 9, 0)]
)
def test_removal(on_cpu, blocks, m, r, poles, single):
    check_removal(blocks, m, r, poles, single)


def check_removal(blocks, m, r, poles, single, device="cpu"):
    u = (draw(blocks, m, r) / r**0.5).to(torch.float32 if single else torch.float64)
    root, p = draw(blocks, m, m), torch.complex(-draw(poles).abs() - 0.1, draw(poles + 1)[1:])
    c = torch.complex(draw(poles), draw(poles))
    args = (u, 3 * draw(r).abs(), draw(r), draw(blocks, m), root @ root.transpose(1, 2))
    u, *rest = (x.to(device) for x in args)
    for mine, theirs in zip(
        removal_kernels.converged_removal(u, *rest, 0.3), ops.converged_removal.op.body(u, *rest, 0.3), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
    rational = (u, *rest, draw(blocks, m).to(device), p.to(device), c.to(device), 0.7)
    mine, theirs = removal_kernels.rational_removal(*rational), ops.rational_removal.op.body(*rational)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


def test_a_singular_block_is_an_error(on_cpu):
    zero = torch.zeros(1, 1, 3, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        removal_kernels.converged_removal(
            zero, zero[0, 0] + 1, zero[0, 0], zero[0, :, 0].reshape(1, 1), zero[..., :1], 0.5
        )


def test_refusals():
    a, g = draw(2, 1, 3), draw(2, 1, 1, 4)
    assert "powers of two" in sketch_kernels.refuse_sketch(a, g, 100, 0, 0, "tensor", "fft")
    assert "rank" in sketch_kernels.refuse_sketch(a, g, 1 << 20, 0, 0, "sjlt")
    assert "triton" in sketch_kernels.refuse_sketch(a, g, 64, 0, 0, "two_sided")
    u = torch.zeros(1, 40, 3, dtype=torch.float64)
    assert "32" in removal_kernels.refuse_converged_removal(u, u[0, 0], u[0, 0], u[..., 0], u, 0.1)


def test_sources_are_found():
    assert (_nvrtc.sources() / "cuda" / "sketch.cu").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
def test_on_a_gpu():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in ((2, 3, 5, 17, 9, 64), (3, 1, 2, 33, 65, 4096 if dtype != torch.float64 else 2048)):
            check_sketch(*shape, "tensor", "fft", dtype, "cuda")
        for shape in ((5, 2, 3, 7, 31, 65), (64, 1, 64, 300, 200, 1024)):
            check_sketch(*shape, "tensor", "scatter", dtype, "cuda")
            check_sketch(*shape, "sjlt", "auto", dtype, "cuda")
        check_sketch(9, 1, 1, 1, 1_000_003, 4096 if dtype != torch.float64 else 1024, "sjlt", "auto", dtype, "cuda")
    for single in (False, True):
        for shape in ((300, 1, 1000, 13), (50, 3, 257, 7), (20, 10, 300, 13), (4, 32, 400, 5)):
            check_removal(*shape, single, "cuda")
    with sui_fast.use_backend("cuda"):
        ops.sketch(draw(3, 1, 4).cuda(), draw(3, 1, 1, 5).cuda(), 16, 0, 0)
