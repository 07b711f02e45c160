"""Sums of tensor sketches: the C++ way and PyTorch's agree, and a parameter has one map however its rows are given."""

import contextlib

import pytest
import torch

import sui_fast
from sui_fast.jacobians.layers import Image
from sui_fast.ops import sketch
from sui_fast.ops.sketching import _tensor
from sui_fast.ops.sketching.layers import Layer
from sui_fast.ops.sketching.sums import TensorSums
from sui_fast.ops.sketching.window import Window


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rank", [16, 30, 64, 2048])
@pytest.mark.parametrize("n, k, s, i, o", [(3, 1, 40, 17, 9), (5, 3, 2, 20, 33), (4, 2, 17, 3, 2), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layers_add_up(n, k, s, i, o, rank, dtype):
    a, g, rows = draw(n, s, i, dtype=dtype), 1e-9 * draw(n, k, s, o, dtype=dtype), draw(n, k, 37, dtype=dtype)
    strided = a.transpose(1, 2).contiguous().transpose(1, 2)
    token = torch.arange(n * s).reshape(n, s) % 7 - 1
    found = []
    for backend in ("auto", "reference"):
        with sui_fast.use_backend(backend):
            sums = TensorSums(n, k, rank, 5, a)
            sums.outer(a, g, 0)
            sums.outer(strided, g, 1, ones=True)
            sums.index(token, g, 6, 2)
            sums.rows(1e-9 * rows, 3)
            found.append(sums.total().double())
    wide_a = a.double()
    one_hot = torch.nn.functional.one_hot(token + 1, 7)[..., 1:].double()
    want = sketch.op.body(wide_a, g.double(), rank, 5, 0) + _tensor(wide_a, g.double(), rank, 5, 1, ones=True)
    for c in range(k):  # an embedding is a linear layer whose outputs are the tokens
        want[:, c] += sketch.op.body(g[:, c].double(), one_hot[:, None], rank, 5, 2)[:, 0]
    want += sketch.op.body(torch.ones(n, 1, 1).double(), 1e-9 * rows.double()[:, :, None], rank, 5, 3)
    size = float(want.abs().max()) + 1e-300
    for got in found:
        bound = 1e-12 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 else 1e-2
        assert float((got - want).abs().max()) <= bound * size


@pytest.mark.parametrize("size_a, size_g", [(1e15, 1e-25), (1e-30, 1e20), (0.0, 1.0), (1.0, 0.0)])
def test_sizes_far_apart_lose_no_digits(size_a, size_g):
    a, g = size_a * draw(4, 20, 30, dtype=torch.float32), size_g * draw(4, 1, 20, 400, dtype=torch.float32)
    got = sketch(a, g, 64, 0, 0, "tensor", "fft")
    want = sketch.op.body(a.double(), g.double(), 64, 0, 0, "tensor", "fft")
    assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [64, 100])
def test_formed_rows_add_up_to_the_sketch_of_their_factors(backend, bias, rank):
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(5, 7, 6, generator=rng, dtype=torch.float64)
    g = torch.randn(5, 2, 7, 4, generator=rng, dtype=torch.float64)
    rows, own = g.transpose(2, 3) @ a[:, None], g.sum(2)
    with sui_fast.use_backend(backend) if backend else contextlib.nullcontext():
        want, found = TensorSums(5, 2, rank, 3, a), TensorSums(5, 2, rank, 3, a)
        want.outer(a, g, 1, bias)
        for part in (slice(0, 2), slice(2, 5)):
            found.formed(rows[part].contiguous(), part.start, 1, own[part] if bias else None)
        torch.testing.assert_close(found.total(), want.total())


CONVOLUTIONS = [  # samples, outputs k, channels, outputs o, image, window
    pytest.param(5, 1, 3, 7, (9,), Window((3,), (2,), (1,), ((1, 2),)), id="one-axis"),
    pytest.param(18, 2, 2, 20, (6, 7), Window((3, 2), (1, 2), (2, 1), ((1, 1), (0, 1))), id="two-axes"),
    pytest.param(3, 1, 5, 40, (4, 3, 5), Window((1, 2, 3), (1, 1, 2), (1, 1, 1), ((0, 0), (1, 1), (1, 0))), id="three"),
    pytest.param(2, 1, 40, 1, (1, 1), Window((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0))), id="one-position"),
    pytest.param(4, 1, 1, 33, (12, 17), Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))), id="long"),
]


def convolution(n, k, c, o, size, window, dtype):
    """x, g [n, k, s, o] and the patches [n, s, c kernel]."""
    x = draw(n, c, *size).to(dtype)
    a = Image(x, window).unfolded()
    g = draw(n, k, o, a.shape[1]).to(dtype).transpose(2, 3)
    return x, g, a


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n, k, c, o, size, window", CONVOLUTIONS)
def test_convolutions_without_their_patches(n, k, c, o, size, window, bias, dtype, monkeypatch):
    kernels = pytest.importorskip("sui_fast.ops.sketching._windows_cpu", reason="the C++ module is not built")
    x, g, a = convolution(n, k, c, o, size, window, dtype)
    wide_g = g.double()
    rows = (wide_g.transpose(2, 3) @ a.double()[:, None]).unflatten(3, (c, -1))
    turned = x.transpose(1, -1).contiguous().transpose(1, -1)  # another layout
    shape = [g.shape[2], *[1] * (len(size) - 1)]  # the window says where positions are
    bound = 1e-12 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 else 1e-2
    for rank in (48, 300):
        folds = [(planes, width) for planes in {1, min(c, 3), c} for width in (16, 48)]
        wants = [_tensor(a.double(), wide_g, rank, 5, 3, ones=bias)]
        wants += [kernels.folded(rows, wide_g.sum(2) if bias else None, *fold, rank, 5, 3) for fold in folds]
        for given in (x, turned):
            outs = [torch.zeros(n, k, rank, dtype=torch.promote_types(dtype, torch.float32)) for _ in wants]
            kernels.add_windows(given, g.transpose(2, 3), window, outs[0], 5, 3, bias)
            for out, fold in zip(outs[1:], folds, strict=True):
                for q in range(k):
                    monkeypatch.setattr("sui_fast.ops.sketching._layers_cpu.fold_sizes", lambda *_, fold=fold: fold)
                    sums = TensorSums(n, 1, rank, 5, given)
                    assert sums.layer(Layer(3, bias, window), given, g[:, q].transpose(1, 2).unflatten(2, shape))
                    out[:, q] = sums.total()[:, 0]
            for got, want in zip(outs, wants, strict=True):
                assert float((got - want).abs().max()) <= bound * float(want.abs().max())


@pytest.mark.parametrize("planes, width", [(8, 16), (3, 32), (1, 16)])
def test_folded_rows_keep_products_in_expectation(planes, width):
    """Every pair of entries has independent signs: over many seeds the products are those of the rows."""
    kernels = pytest.importorskip("sui_fast.ops.sketching._windows_cpu", reason="the C++ module is not built")
    rows, bias = draw(3, 1, 50, 8, 2), draw(3, 1, 50)
    seeds = 500
    found = torch.stack([kernels.folded(rows, bias, planes, width, 64, seed, 0)[:, 0] for seed in range(seeds)])
    products = found @ found.transpose(1, 2)
    flat = torch.cat([rows.flatten(1), bias.flatten(1)], 1)
    error = (products.mean(0) - flat @ flat.T).abs()
    assert (error <= 5 * products.std(0) / seeds**0.5 + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 48, 97, 256])
def test_layers_of_one_position_in_one_call(rank, dtype):
    """Sides that are transformed and sides that are not, layouts that are read as they are and others, one table."""
    pytest.importorskip("sui_fast.ops.sketching._layers_cpu", reason="the C++ module is not built")
    n, wide = 19, torch.promote_types(dtype, torch.float32)
    sums, want = TensorSums(n, 1, rank, 5, torch.empty(0, dtype=dtype)), 0
    for stream, (i, o, bias) in enumerate(
        [(40, 50, True), (300, 3, False), (2, 70, True), (1, 1, False), (60, 33, False)]
    ):
        x, g = draw(i, n).to(dtype).T if i == 40 else draw(n, i).to(dtype), draw(n, 2 * o).to(dtype)[:, :o]
        assert sums.layer(Layer(stream, bias), x, g)
        want = want + _tensor(x.double()[:, None], g.double()[:, None, None], rank, 5, stream, ones=bias)
    table, rows = torch.zeros(50, rank), list(range(1, 39, 2))
    bound = (1e-12 if dtype == torch.float64 else 2e-5) * float(want.abs().max())
    assert sums.keep(table, rows, 0.5)
    assert float((2 * table[rows] - want[:, 0]).abs().max()) <= max(bound, 1e-6 * float(want.abs().max()))
    assert float((sums.total() - want).abs().max()) <= bound and sums.total().dtype == wide
    assert not table[::2].any()


@pytest.mark.parametrize("o", [3, 100])
def test_a_table_keeps_nothing_of_a_sum_that_is_not_finite(o):
    x, g, table = draw(20, 9, dtype=torch.float32), draw(20, o, dtype=torch.float32), torch.zeros(20, 64)
    g[17, 1] = torch.nan
    sums = TensorSums(20, 1, 64, 0, x)
    if not sums.layer(Layer(0, True), x, g):
        sums.outer(x[:, None], g[:, None, None], 0, True)
    assert not sums.keep(table, range(20), 1.0) and not table.any()
    assert sums.total().isfinite().all(2)[:, 0].tolist() == [i != 17 for i in range(20)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("i, o", [(1, 1), (30, 400)])
def test_what_is_not_finite_stays_visible(bad, i, o):
    a, g = draw(4, 20, i, dtype=torch.float32), draw(4, 1, 20, o, dtype=torch.float32)
    a[1, 3, 0] = g[2, 0, 5, 0] = bad
    for backend in ("auto", "reference"):
        with sui_fast.use_backend(backend):
            sums = TensorSums(4, 1, 64, 0, a)
            sums.outer(a, g, 0)
            finite = sums.total().isfinite().all(2)[:, 0]
        assert finite.tolist() == [True, False, False, True]
