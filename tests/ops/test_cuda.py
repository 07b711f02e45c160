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
from sui_fast.ops.sketching import _random, _tensor
from sui_fast.ops.sketching.sums import TensorSums

ROOT = Path(__file__).parents[2] / "csrc"
FILES = sorted((ROOT / "cuda").glob("*.cu"))
NVCC, CXX = shutil.which("nvcc"), shutil.which("g++")
KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\((.*?)\)\s*{', re.S)
SHARED = re.compile(r"extern __shared__ (\w+) shared\[\];")
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
    report = ROOT.parent / "build" / "nvcc" / f"{path.stem}-{target}.txt"  # registers and spills, kept to look at
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(done.stderr)
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
        pointer = r"\1* shared = reinterpret_cast<\1*>(shim::shared_memory.data());"
        text, count = SHARED.subn(pointer, path.read_text())
        assert count
        driver = [f'#include "{shim}"', text]
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
        assert threads % 32 == 0 and threads <= 256 and shared <= _nvrtc.limits(like.device).shared
        assert all(x.is_contiguous() for x in args if isinstance(x, torch.Tensor))
        gx, gy = (*grid, 1)[:2]
        assert 0 < gx < 2**31 and 0 < gy < 65536 and isinstance(gx, int) and isinstance(gy, int)
        values = [np.float64(x) if isinstance(x, float) else np.int64(x) for x in _nvrtc.words(args)]  # as CuPy does
        assert len(values) == len(signatures[name]), name
        typed = []
        for kind, value in zip(signatures[name], values, strict=True):
            assert isinstance(value, float) == (kind is ctypes.c_double), name
            typed.append(kind(value.item()))
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
        (1, 2, 1, 127, 129, 4096, "fft"),
        (1, 1, 1, 1, 1, 1, "scatter"),
        (5, 2, 3, 7, 31, 65, "scatter"),
        (3, 3, 9, 5, 6, 17, "scatter"),
        (2, 1, 1, 63, 129, 1000, "auto"),
        (7, 1, 1, 1, 300, 64, "scatter"),
        (3, 1, 1, 4097, 3, 12288, "scatter"),
        (0, 2, 3, 4, 5, 8, "auto"),
        (2, 2, 0, 4, 5, 8, "auto"),
    ],
)
def test_tensor_sketch(on_cpu, n, k, s, i, o, rank, route, dtype):
    check_sketch(n, k, s, i, o, rank, "tensor", route, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n, k, s, i, o, rank",
    [
        *((1, 1, 1, 1, 1, 1), (9, 1, 1, 1, 4099, 127), (6, 1, 1, 1, 40_000, 1000), (5, 1, 1, 1, 8192, 4097)),
        *((3, 2, 3, 7, 31, 65), (5, 1, 9, 5, 6, 17), (3, 1, 8, 8, 8, 12_000), (0, 1, 1, 3, 4, 5)),
    ],
)
def test_sjlt(on_cpu, n, k, s, i, o, rank, dtype):
    check_sketch(n, k, s, i, o, rank, "sjlt", "auto", dtype)


def check_sketch(n, k, s, i, o, rank, kind, route, dtype, device="cpu", kernel=sketch_kernels.sketch):
    a = draw(n + 1, i, s).to(dtype)[1:].transpose(1, 2).to(device)  # offset and strided
    g = draw(n, s, k, 2 * o).to(dtype)[..., ::2].transpose(1, 2).to(device)
    rest = (rank, -(1 << 40) - 7, 3, kind, route)
    assert sketch_kernels.refuse_sketch(a, g, *rest) is None
    got, body = kernel(a, g, *rest), ops.sketch.op.body
    plain, exact = body(a, g, *rest), body(a.double(), g.double(), *rest)
    assert got.shape == plain.shape and got.dtype == plain.dtype
    if got.numel():
        size = float(exact.abs().max()) + 1e-300
        mine, theirs = (float((x - exact).abs().max()) / size for x in (got, plain))
        assert mine <= (1e-13 if dtype == torch.float64 else 2 * theirs + 16 * torch.finfo(got.dtype).eps)


@pytest.mark.parametrize("size_a, size_g", [(1e15, 1e-25), (1e-30, 1e20), (0.0, 1.0), (1.0, 0.0), (1.0, 1e-9)])
def test_sizes_far_apart_lose_no_digits(on_cpu, size_a, size_g):
    check_sizes(size_a, size_g, "cpu", sketch_kernels.sketch)


def check_sizes(size_a, size_g, device, kernel):
    a, g = (size_a * draw(2, 5, 30)).float().to(device), (size_g * draw(2, 1, 5, 40)).float().to(device)
    got = kernel(a, g, 64, 0, 0, "tensor", "fft")
    want = ops.sketch.op.body(a.double(), g.double(), 64, 0, 0, "tensor", "fft")
    assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(on_cpu, bad):
    a, g = draw(4, 3, 1).float(), draw(4, 1, 3, 1).float()
    a[1, 1, 0] = g[2, 0, 2, 0] = bad
    finite = sketch_kernels.sketch(a, g, 64, 0, 0, "tensor", "fft").isfinite().all(2)[:, 0]
    assert finite.tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [64, 100, 3000])
def test_layers_add_up_in_the_fourier_domain(on_cpu, monkeypatch, dtype, rank):
    back = []
    finish = sketch_kernels.finish
    monkeypatch.setattr(sketch_kernels, "finish", lambda *args: back.append(1) or finish(*args))
    monkeypatch.setattr(sketch_kernels, "_cheap_fft", lambda a, g: a.shape[1] < 9)
    check_sums(dtype, rank, "cpu", sketch_kernels)
    assert len(back) == (rank < 3000)  # one way back for all layers


def check_sums(dtype, rank, device, kernels=None):
    sums = TensorSums(3, 2, rank, 5, torch.empty(0, dtype=dtype, device=device))
    sums.kernels = kernels or sums.kernels
    want = torch.zeros(3, 2, rank, dtype=torch.float64, device=device)
    for stream, (s, i, o, ones) in enumerate([(1, 7, 5, True), (4, 17, 9, False), (9, 5, 6, True), (3, 0, 6, True)]):
        a = draw(4, i, s).to(device, dtype)[1:].transpose(1, 2)
        g = draw(3, s, 2, 2 * o).to(device, dtype)[..., ::2].transpose(1, 2)
        sums.outer(a, g, stream, ones)
        want += _tensor(a.double(), g.double(), rank, 5, stream, ones=ones)
    token = torch.tensor([[0, 2, -1], [1, 1, 5], [3, 0, 0]], device=device)
    g = draw(3, 2, 3, 11).to(device, dtype)
    sums.index(token, g, 6, 7)
    one_hot = torch.nn.functional.one_hot(token + 1, 7)[..., 1:].double()
    for c in range(2):
        want[:, c] += ops.sketch.op.body(g[:, c].double(), one_hot[:, None], rank, 5, 7)[:, 0]
    bound = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}[dtype]
    assert float((sums.total() - want).abs().max()) <= bound * float(want.abs().max())


@pytest.mark.parametrize("rank", [1, 3, 100, 1025, 2047, *(2**p for p in range(1, 13))])
def test_every_length_of_transform(on_cpu, rank):
    for dtype in (torch.float64, torch.float32):
        check_sketch(1, 1, 2, 3, 5, rank, "tensor", "fft", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_exactly(on_cpu, dtype):
    """One entry a row, one bucket: the result is the entry or its negative."""
    patterns = torch.cat([torch.arange(0, 65536, 29), torch.tensor([0x7BFF, 0x7C00, 0x7C01, 0xFC00, 0x8000, 0x8001])])
    g = patterns.to(torch.int32).to(torch.int16).view(dtype)[:, None, None, None]
    args = (torch.ones_like(g[:, 0]), g, 1, 0, 0, "sjlt")
    got, expected = sketch_kernels.sketch(*args), ops.sketch.op.body(*args)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_aligned_and_offset_rows(on_cpu, offset, dtype):
    g = draw(offset + 5 * 64).to(dtype)[offset:].reshape(5, 1, 1, 64)
    args = (draw(5, 1, 1).to(dtype), g, 33, 1, 2, "sjlt")
    torch.testing.assert_close(sketch_kernels.sketch(*args), ops.sketch.op.body(*args))


def test_strips_of_a_formed_row(on_cpu, monkeypatch):
    monkeypatch.setattr(sketch_kernels, "_ELEMENTS", 40)
    for kind in ("tensor", "sjlt"):
        check_sketch(3, 2, 9, 5, 11, 33, kind, "scatter" if kind == "tensor" else "auto", torch.float64)


@pytest.mark.parametrize("single", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "blocks, m, r, poles",
    [
        *((1, 1, 1, 1), (3, 1, 130, 5), (2, 3, 65, 7), (1, 10, 33, 13), (1, 31, 129, 3), (1, 32, 40, 2)),
        *((2, 2, 9, 0), (2, 2, 0, 3), (0, 3, 9, 2), (5, 4, 1, 4)),
    ],
)
def test_removal(on_cpu, blocks, m, r, poles, single):
    check_removal(blocks, m, r, poles, single)


def check_removal(
    blocks, m, r, poles, single, device="cpu",
    converged=removal_kernels.converged_removal, rational=removal_kernels.rational_removal,
):  # fmt: skip
    u = (draw(blocks, m, r) / max(r, 1) ** 0.5).to(torch.float32 if single else torch.float64)
    u = u.transpose(0, 2).contiguous().transpose(0, 2)
    root, p = draw(blocks, m, m), torch.complex(-draw(poles).abs() - 0.1, draw(poles + 1)[1:])
    c = torch.complex(draw(poles), draw(poles)).conj()
    args = (u, 3 * draw(r).abs(), draw(r), draw(blocks, m), root @ root.transpose(1, 2))
    u, *rest = (x.to(device) for x in args)
    body = ops.converged_removal.op.body(u, *rest, 0.3)
    for mine, theirs in zip(converged(u, *rest, 0.3), body, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
    case = (u, *rest, draw(blocks, m).to(device), p.to(device), c.to(device), 0.7)
    torch.testing.assert_close(rational(*case), ops.rational_removal.op.body(*case), rtol=1e-10, atol=1e-11)


def test_a_singular_block_is_an_error(on_cpu):
    zero = torch.zeros(1, 1, 3, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        removal_kernels.converged_removal(zero, zero[0, 0] + 1, zero[0, 0], zero[:, 0, :1], zero[..., :1], 0.5)


def test_refusals():
    a, g = draw(2, 1, 3), draw(2, 1, 1, 4)
    assert "powers of two" in sketch_kernels.refuse_sketch(a, g, 3000, 0, 0, "tensor", "fft")
    assert "rank" in sketch_kernels.refuse_sketch(a, g, 1 << 20, 0, 0, "sjlt")
    assert "triton" in sketch_kernels.refuse_sketch(a, g, 64, 0, 0, "two_sided")
    torch.use_deterministic_algorithms(True)
    try:
        assert "any order" in sketch_kernels.refuse_sketch(a, g, 64, 0, 0)
    finally:
        torch.use_deterministic_algorithms(False)
    u = torch.zeros(1, 40, 3, dtype=torch.float64)
    assert "32" in removal_kernels.refuse_converged_removal(u, u[0, 0], u[0, 0], u[..., 0], u, 0.1)


def test_sources_are_found_and_stand_alone():
    """NVRTC has no standard library: only our own headers are included."""
    for path in (*FILES, *sorted((ROOT / "include").rglob("*.h"))):
        included = re.findall(r"#include\s+(\S+)", path.read_text())
        assert all(re.fullmatch(r'"(sui/)?\w+\.h"', name) for name in included), path
    assert (_nvrtc.sources() / "cuda" / "sketch.cu").is_file()


PHILOX = """
#include "sui/philox.h"
extern "C" void words(unsigned long long index, unsigned word, unsigned stream, unsigned long long seed, unsigned* to) {
  const sui::Philox found = sui::philox(index, word, stream, seed);
  for (int part = 0; part < 4; ++part) to[part] = sui::hash_word(found, part);
}
extern "C" unsigned place(unsigned word, unsigned buckets) { return sui::bucket(word, buckets); }
extern "C" int negative(unsigned long long i, unsigned long long j, unsigned word, unsigned stream,
                        unsigned long long seed) {
  return sui::negative(sui::philox(sui::sign_index(i, j), word, stream, seed), j);
}
"""


@pytest.mark.skipif(CXX is None, reason="no g++ on this machine")
def test_philox_header_draws_the_words_of_the_body(tmp_path):
    (tmp_path / "philox.cpp").write_text(PHILOX)
    flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'include'}"]
    subprocess.run([CXX, *flags, tmp_path / "philox.cpp", "-o", library := tmp_path / "philox.so"], check=True)
    header, out = ctypes.CDLL(str(library)), (ctypes.c_uint * 4)()
    u32, u64 = ctypes.c_uint, ctypes.c_ulonglong
    for seed in (0, 1 << 40, -5, 2**63 + 9, 2**64 - 1):
        for index in (0, 1, 2**32 - 1, 2**32, 2**33 + 5, 2**62 + 3):
            header.words(u64(index), u32(2), u32(7), u64(seed), out)
            assert list(out) == [int(x) for x in _random.philox(torch.tensor([index]), 2, 7, seed)]
    for buckets in (1, 2, 3, 4096, 2**31 - 1):
        place, sign = _random.bucket_and_sign(9, buckets, 2, 7, 11, "cpu", torch.float64)
        for e in range(9):
            header.words(u64(e // 4), u32(2), u32(7), u64(11), out)
            assert header.place(u32(out[e % 4]), u32(buckets)) == place[e] and 1 - 2 * (out[e % 4] & 1) == sign[e]
    table = _random.signs(3, 300, 3, 7, 11, "cpu", torch.float64, begin=2**20)
    found = [[header.negative(u64(2**20 + i), u64(j), u32(3), u32(7), u64(11)) for j in range(300)] for i in range(3)]
    assert torch.equal(1 - 2 * torch.tensor(found, dtype=torch.float64), table)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
def test_on_a_gpu():
    with torch.cuda.stream(torch.cuda.Stream()), sui_fast.use_backend("cuda"):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            for shape in ((2, 3, 5, 17, 9, 64), (3, 1, 2, 33, 65, 4096)):
                check_sketch(*shape, "tensor", "fft", dtype, "cuda", ops.sketch)
            check_sums(dtype, 64, "cuda")
            check_sums(dtype, 100, "cuda")
            for shape in ((5, 2, 3, 7, 31, 65), (64, 1, 64, 300, 200, 1024), (3, 1, 1, 7, 31, 12_000)):
                check_sketch(*shape, "tensor", "scatter", dtype, "cuda", ops.sketch)
                check_sketch(*shape, "sjlt", "auto", dtype, "cuda", ops.sketch)
            for length in (1_000_003, 1_000_000):
                check_sketch(9, 1, 1, 1, length, 4096, "sjlt", "auto", dtype, "cuda", ops.sketch)
            check_sketch(300_001, 1, 1, 1, 8, 16, "sjlt", "auto", dtype, "cuda", ops.sketch)
        for sizes in ((1e15, 1e-25), (0.0, 1.0), (1.0, 1e-9)):
            check_sizes(*sizes, "cuda", ops.sketch)
        g = torch.zeros(215, 1, 1, 10_000_000, dtype=torch.float16, device="cuda")  # more than 2^31 numbers
        g[-1, 0, 0] = draw(10_000_000).half()
        args = (128, 0, 0, "sjlt", "auto")
        want = ops.sketch.op.body(g.new_ones(1, 1, 1), g[-1:], *args)
        torch.testing.assert_close(ops.sketch(g.new_ones(215, 1, 1), g, *args)[-1:], want, rtol=1e-4, atol=1e-2)
        del g
        for single in (False, True):
            for shape in ((300, 1, 1000, 13), (50, 3, 257, 7), (20, 10, 300, 13), (4, 32, 400, 5), (0, 2, 9, 3)):
                check_removal(*shape, single, "cuda", ops.converged_removal, ops.rational_removal)
