"""The C++ kernels of the sketches against their bodies, and the random numbers they share with every other backend."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import sui_fast
from sui_fast import ops
from sui_fast.ops.products.rows import Piece, _reference, row_writer
from sui_fast.ops.sketching._random import bucket_and_sign, signs

_cpu = pytest.importorskip("sui_fast._cpu", reason="the C++ module is not built")
sketches = pytest.importorskip("sui_fast.ops.sketching._cpu")

SHAPES = [  # n, k, s, i, o, rank
    pytest.param(1, 1, 1, 1, 1, 1, id="all-one"),
    pytest.param(5, 3, 2, 17, 33, 65, id="odd"),
    pytest.param(67, 1, 1, 1, 1025, 127, id="formed-rows"),
    pytest.param(2, 1, 300, 20, 9, 2048, id="positions"),
    pytest.param(3, 2, 5, 600, 600, 31, id="strips"),
    pytest.param(9, 10, 1, 255, 10, 513, id="many-outputs"),
    pytest.param(20, 1, 5, 64, 64, 7, id="more-entries-than-buckets"),
    pytest.param(0, 2, 3, 4, 5, 6, id="no-samples"),
    pytest.param(3, 2, 0, 4, 5, 6, id="no-positions"),
    pytest.param(3, 2, 1, 0, 5, 6, id="no-inputs"),
    pytest.param(3, 0, 1, 4, 5, 6, id="no-outputs"),
]
KINDS = [("tensor", "auto"), ("tensor", "fft"), ("tensor", "scatter")] + [
    (kind, "auto") for kind in ops.sketching.KINDS if kind != "tensor"
]


def draw(*shape):
    rng = np.random.default_rng(sum(shape))
    return torch.from_numpy(rng.standard_normal(shape))


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is NaN."""
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        fresh = getattr(owner, name)

        def fill(*args, fresh=fresh, **kwargs):
            out = fresh(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(1 << 20)

        monkeypatch.setattr(owner, name, fill)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind, route", KINDS)
@pytest.mark.parametrize("n, k, s, i, o, rank", SHAPES)
def test_agrees_with_the_body(n, k, s, i, o, rank, kind, route, dtype, poisoned):
    a = draw(n + 1, i, s).to(dtype)[1:].transpose(1, 2)  # offset and strided
    g = draw(n, s, k, 2 * o).to(dtype)[..., ::2].transpose(1, 2)
    rest = (rank, 1 << 40, 3, kind, route)
    got = sketches.sketch(a, g, *rest)
    plain = ops.sketch.op.body(a, g, *rest)
    exact = ops.sketch.op.body(a.double(), g.double(), *rest)
    assert got.shape == plain.shape and got.dtype == plain.dtype
    if got.numel():
        size = float(exact.abs().max()) + 1e-300
        mine, theirs = (float((x - exact).abs().max()) / size for x in (got, plain))
        # the body in float64 is its own measure: no error of its own to compare with
        assert mine <= (1e-13 if dtype == torch.float64 else 2 * theirs + 8 * torch.finfo(got.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("begin, count, buckets", [(0, 1, 1), (0, 4099, 1000), (5, 1030, 1 << 29), (1023, 2, 7)])
def test_random_numbers_are_those_of_pytorch(begin, count, buckets, dtype):
    place, sign = torch.empty(count, dtype=torch.int32), torch.empty(count, dtype=dtype)
    name = str(dtype).split(".")[1]
    getattr(_cpu, f"hash_{name}")(2, 5, 77, begin, count, buckets, place.data_ptr(), sign.data_ptr())
    places, all_signs = bucket_and_sign(begin + count, buckets, 2, 5, 77, "cpu", dtype)
    assert torch.equal(place.long(), places[begin:]) and torch.equal(sign, all_signs[begin:])
    table = torch.empty(7, 300, dtype=dtype)
    getattr(_cpu, f"signs_{name}")(3, 5, 77, begin, 7, 300, 2.0, table.data_ptr())
    assert torch.equal(table, 2 * signs(begin + 7, 300, 3, 5, 77, "cpu", dtype)[begin:])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads):
    a, g = draw(70, 1, 1), draw(70, 1, 1, 90_000)
    wide_a, wide_g = draw(40, 8, 200), draw(40, 1, 8, 100)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, threads):
            torch.set_num_threads(count)
            found.append([sketches.sketch(a, g, 64, 0, 0, "sjlt")])
            found[-1] += [sketches.sketch(wide_a, wide_g, 256, 0, 0, "tensor", r) for r in ("fft", "scatter")]
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n, k, step", [(1, 1, 1), (7, 3, 2), (5, 1, 8)])
def test_rows_are_written_where_they_belong(n, k, step, dtype):
    pieces = [
        Piece(1, draw(n, k, 5).to(dtype), draw(n, 3).to(dtype)),
        Piece(17, draw(n, k, 4).to(dtype)),
        Piece(21, draw(n, k, 1).to(dtype), draw(n, 33).to(dtype)),
    ]
    buffers = [torch.full((step, k, 60), float("nan"), dtype=dtype)[:, :, :54] for _ in "12"]
    for write in (row_writer(pieces, buffers[0]), _reference(pieces, buffers[1])):
        for number in range(-(-n // step)):
            write(number)
    assert torch.equal(buffers[0].nan_to_num(9), buffers[1].nan_to_num(9))
    assert not torch.isnan(buffers[0][: n % step or step, :, 1:16]).any() and torch.isnan(buffers[0][:, :, 0]).all()


def test_rows_of_another_dtype_are_left_to_pytorch():
    pieces, out = [Piece(0, draw(2, 1, 3), draw(2, 4))], torch.zeros(2, 1, 12)
    row_writer(pieces, out)(0)
    torch.testing.assert_close(out[:, 0], torch.einsum("no,ni->noi", pieces[0].g[:, 0], pieces[0].a).flatten(1).float())


def test_more_than_two_to_the_31_numbers():
    """Memory that nobody wrote to costs nothing: all numbers are zero but the last."""
    size = 2**31 + 1030
    g = torch.from_numpy(np.zeros((1, 1, 1, size), np.float32))
    g[0, 0, 0, -1] = 3
    got = sketches.sketch(torch.ones(1, 1, 1), g, 4096, 0, 0, "sjlt")[0, 0]
    place, sign = torch.empty(1, dtype=torch.int32), torch.empty(1)
    _cpu.hash_float32(2, 0, 0, size - 1, 1, 4096, place.data_ptr(), sign.data_ptr())
    assert got[place.item()] == 3 * sign.item() and int((got != 0).sum()) == 1


OTHER_SETS = """
import torch
from sui_fast import ops
from sui_fast.ops.sketching import _cpu
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64):
    for shape in ((37, 1, 1, 1, 1030, 100), (3, 2, 9, 20, 33, 64)):
        n, k, s, i, o, rank = shape
        a, g = torch.randn(n, s, i, dtype=dtype), torch.randn(n, k, s, o, dtype=dtype)
        for kind, route in (("tensor", "fft"), ("tensor", "scatter"), ("sjlt", "auto"), ("rademacher", "auto")):
            got, want = _cpu.sketch(a, g, rank, 1, 2, kind, route), ops.sketch.op.body(a, g, rank, 1, 2, kind, route)
            error = float((got - want).norm() / want.norm())
            assert error < (1e-5 if dtype == torch.float32 else 1e-14), (kind, route, shape, error)
print("agrees on", __import__("sui_fast._cpu")._cpu.instruction_set())
"""


@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_other_instruction_sets(name):
    done = subprocess.run(
        [sys.executable, "-c", OTHER_SETS], capture_output=True, text=True, env={**os.environ, "SUI_FAST_CPU": name}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agrees on" in done.stdout


def test_runs_by_itself_and_says_so():
    a, g = draw(3, 2, 4), draw(3, 1, 2, 5)
    assert ops.explain(ops.sketch, a, g, 8, 0, 0).backend == "cpu"
    with sui_fast.use_backend("reference"):
        plain = ops.sketch(a, g, 8, 0, 0)
    torch.testing.assert_close(ops.sketch(a, g, 8, 0, 0), plain, rtol=1e-12, atol=1e-12)
