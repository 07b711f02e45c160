"""Triton kernels against their bodies: interpreted on the CPU, compiled ahead of time, and on a GPU where there is one.

Triton reads TRITON_INTERPRET when it is imported, so every check runs this file in a process of its own.
"""

import contextlib
import importlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

import sui_fast  # noqa: E402
from sui_fast import ops  # noqa: E402
from sui_fast.ops.sketching import _random  # noqa: E402

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FAMILIES = {"ntk_gram": "gram", "ntk_gram_sum": "gram", "jvp": "products", "vjp": "products", "sketch": "sketching"}
DEVICE = "cpu"


def module(family):
    return importlib.import_module(f"sui_fast.ops.{family}._triton")


# Comparison -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def poisoned():
    """Fresh memory holds NaN, which a number that was never written shows."""
    method, function = torch.Tensor.new_empty, torch.empty

    def fill(make):
        def poisoned_make(*args, **options):
            out = make(*args, **options)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return poisoned_make

    torch.Tensor.new_empty, torch.empty = fill(method), fill(function)
    try:
        yield
    finally:
        torch.Tensor.new_empty, torch.empty = method, function


def draw(dtype, *shape):
    """Numbers in a tensor that is neither contiguous nor at the start of its memory."""
    wide = torch.randn(shape[0] + 1, *shape[1:-1], 2 * shape[-1], dtype=torch.float64)
    return wide.to(dtype).to(DEVICE)[1:, ..., ::2]


def compare(name, *args):
    """The kernel errs at most twice as much as the body in the same dtype, both against float64."""
    kernels, body = module(FAMILIES[name]), ops.OPS[name].body
    with poisoned():
        got = getattr(kernels, name)(*args)
    plain = body(*args)
    exact = body(*tree_map_only(torch.Tensor, torch.Tensor.double, args))
    assert got.shape == exact.shape and got.dtype == plain.dtype, (name, got.shape, exact.shape)
    if got.numel():
        size = float(exact.abs().max()) + 1e-300
        mine, theirs = float((got - exact).abs().max()) / size, float((plain - exact).abs().max()) / size
        if got.dtype == torch.float64:  # the body errs as much as in float32, in units of the last place
            single = body(*tree_map_only(torch.Tensor, torch.Tensor.float, args))
            theirs = float((single - exact).abs().max()) / size * 2.0**-29
        shapes = tree_map_only(torch.Tensor, lambda x: (list(x.shape), x.dtype), args)
        assert mine <= 2 * theirs + 4 * torch.finfo(got.dtype).eps, (name, shapes, mine, theirs)


def compare_gram():
    shapes = [  # n1 k1 s1 n2 k2 s2 i o
        (1, 1, 1, 1, 1, 1, 1, 1), (3, 2, 1, 5, 1, 1, 17, 9), (7, 3, 1, 6, 2, 1, 33, 31), (5, 1, 3, 4, 2, 2, 7, 13),
        (2, 5, 2, 3, 3, 3, 16, 64), (13, 5, 1, 17, 4, 1, 65, 63), (129, 1, 1, 127, 1, 1, 15, 17),
        (33, 4, 2, 3, 4, 1, 9, 5), (0, 2, 1, 3, 2, 1, 4, 4), (3, 2, 1, 0, 2, 1, 4, 4), (3, 2, 1, 2, 2, 1, 0, 3),
    ]  # fmt: skip
    for n1, k1, s1, n2, k2, s2, i, o in shapes:
        for dtype in DTYPES:
            left = draw(dtype, n1, i, s1).transpose(1, 2), draw(dtype, n1, s1, k1, o).transpose(1, 2)
            compare("ntk_gram", *left, draw(dtype, n2, s2, i), draw(dtype, n2, k2, s2, o))
    kernels = module("gram")
    none = draw(torch.float32, 3, 1, 4)[:, :0], draw(torch.float32, 3, 2, 1, 4)[:, :, :0]
    assert torch.equal(kernels.ntk_gram(*none, *none), torch.zeros(6, 6, device=DEVICE))
    assert kernels.pairs(1, 1, [(1, 9, 9)])[0] == (1, 1) and kernels.pairs(4, 4, [(1, 9, 9)])[0] == (4, 4)
    many = draw(torch.float32, 2, 64, 3), draw(torch.float32, 2, 1, 64, 3)
    assert "rows" in kernels.refuse_ntk_gram(*many, *many)
    compare_gram_sum(kernels)
    if DEVICE == "cpu":
        compare_large(70, 33, 40)  # that what runs on a GPU alone does run


def compare_gram_sum(kernels):
    """Layers of different sizes, some in the launch, some with one of their own, some as rows."""
    cases = [  # n1 k1 n2 k2, then s1 s2 i o of every layer
        ((5, 1, 3, 1), [(1, 1, 17, 9), (3, 2, 7, 13), (1, 1, 1, 1), (2, 5, 33, 31)]),
        ((7, 3, 6, 2), [(1, 1, 15, 4), (2, 2, 16, 8), (64, 64, 3, 3)]),
        ((3, 5, 4, 4), [(1, 1, 40, 5), (1, 1, 3000, 2), (3, 1, 9, 63)]),
        ((67, 1, 65, 1), [(1, 1, 65, 31), (1, 1, 0, 3), (1, 1, 3, 5)]),
        ((2, 4, 3, 3), [(1, 1, 4000, 2)]),
        ((2, 2, 2, 2), [(64, 64, 3, 3), (64, 64, 3, 4)]),
        ((0, 2, 3, 2), [(1, 1, 4, 4), (2, 2, 3, 3)]),
        ((3, 2, 4, 2), [(0, 0, 4, 4), (1, 1, 3, 0)]),
    ]  # fmt: skip
    seen, kernels._ONCE_MORE = set(), 10  # so that small layers show every way
    for (n1, k1, n2, k2), layers in cases:
        for dtype in DTYPES:
            a1 = [draw(dtype, n1, i, s).transpose(1, 2) for s, _, i, _ in layers]
            g1 = [draw(dtype, n1, s, k1, o).transpose(1, 2) for s, _, _, o in layers]
            a2 = [draw(dtype, n2, t, i) for _, t, i, _ in layers]
            g2 = [draw(dtype, n2, k2, t, o) for _, t, _, o in layers]
            bias = [j % 2 == 0 for j in range(len(layers))]
            compare("ntk_gram_sum", a1, g1, a2, g2, bias)
            _, together, apart, rows = kernels._layers(a1, g1, a2, g2)
            seen |= {name for name, part in (("one", together), ("own", apart), ("rows", rows)) if part}
            refused = kernels.refuse_ntk_gram_sum(a1, g1, a2, g2, bias)
            assert (refused is None) == bool(together or apart)
    assert seen == {"one", "own", "rows"}
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(27, 7, bias=False), torch.nn.LayerNorm(7),
        torch.nn.Linear(7, 2),
    ).to(DEVICE, torch.float64)  # fmt: skip
    found = sui_fast.jacobian(model, torch.randn(9, 2, 5, 5, dtype=torch.float64, device=DEVICE))
    rows = found.rows()
    with sui_fast.use_backend("ntk_gram_sum=triton"):
        torch.testing.assert_close(found.gram(), rows @ rows.T)
        torch.testing.assert_close(found.gram(found.select(range(2, 5)), memory=1), rows @ rows[4:10].T)


def compare_products():
    shapes = [  # n k s i o r
        (1, 1, 1, 1, 1, 1), (5, 2, 3, 7, 4, 3), (3, 17, 1, 33, 31, 2), (2, 5, 129, 16, 65, 1), (7, 1, 5, 63, 17, 2),
        (130, 3, 1, 5, 129, 1), (1, 4, 31, 65, 127, 2),
        (0, 2, 3, 4, 5, 2), (3, 2, 1, 5, 4, 0), (3, 2, 0, 5, 4, 2), (3, 0, 2, 5, 4, 2), (3, 2, 1, 0, 4, 2),
    ]  # fmt: skip
    for n, k, s, i, o, r in shapes:
        for dtype in DTYPES:
            a, g = draw(dtype, n, i, s).transpose(1, 2), draw(dtype, n, s, k, o).transpose(1, 2)
            compare("jvp", a, g, draw(dtype, r, i, o).transpose(1, 2))
            compare("vjp", a, g, draw(dtype, n, r, k).transpose(1, 2))
    fresh, made = torch.Tensor.new_empty, []
    torch.Tensor.new_empty = lambda *args, **kwargs: made.append(fresh(*args, **kwargs)) or made[-1]
    a, g, t, c = (draw(torch.float32, *size) for size in ((70, 3, 5), (70, 2, 3, 40), (9, 40, 5), (70, 2, 9)))
    module("products").jvp(a, g, t), module("products").vjp(a, g, c)
    torch.Tensor.new_empty = fresh  # results and partial sums of them are all that is made
    assert max(x.numel() for x in made) < 70 * 3 * 9 * 40 / 4, [x.shape for x in made]


@triton.jit
def words_kernel(p_out, rows, columns, word, stream, seed_low, seed_high, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    low, high = (at % columns).to(tl.uint32), (at // columns).to(tl.uint32)
    words = philox(low, high, word, stream, seed_low, seed_high)  # noqa: F821
    for j in tl.static_range(4):
        tl.store(p_out + at * 4 + j, words[j].to(tl.int64), mask=at < rows * columns)


def compare_sketch():
    kernels = module("sketching")
    globals()["philox"] = kernels.philox
    for seed, stream, word in ((5, 7, 3), (-1, 0xFFFFFFFF, 0), (0x123456789ABCDEF0, -3, 0x89ABCDEF)):
        got = torch.full((15, 4), -1, dtype=torch.int64, device=DEVICE)
        keys = [kernels._signed(x) for x in (word, stream, seed, seed >> 32)]
        words_kernel[(1,)](got, 3, 5, *keys, BLOCK=16)
        i, j = torch.arange(3, device=DEVICE)[:, None], torch.arange(5, device=DEVICE)
        assert torch.equal(got, torch.stack(_random.philox((i << 32) | j, word, stream, seed), 2).reshape(15, 4))
        for rows, columns in ((33, 1), (17, 129), (1, 300)):
            one = torch.eye(rows, device=DEVICE)
            got = kernels.project(one, None, (rows, 1, 1, rows), columns, word, (seed, stream))
            assert torch.equal(got, _random.signs(rows, columns, word, stream, seed, DEVICE, torch.float32))
    shapes = [  # n k s i o rank
        (1, 1, 1, 1, 1, 1), (3, 2, 1, 17, 9, 127), (2, 3, 5, 7, 13, 64), (5, 1, 1, 33, 7, 257), (1, 2, 2, 65, 5, 36),
        (0, 2, 3, 4, 5, 8), (3, 2, 0, 4, 5, 8), (3, 2, 1, 4, 0, 8),
        (2, 3, 17, 9, 33, 64), (1, 1, 131, 5, 7, 4224), (3, 2, 64, 3, 17, 31),
    ]  # fmt: skip
    assert kernels._is_fused(torch.float32, 131, 7, 4224) and kernels._outer_plan(torch.float32, 1, 131, 66, 64)[3] > 1
    for n, k, s, i, o, rank in shapes:
        for dtype in DTYPES:
            a, g = draw(dtype, n, i, s).transpose(1, 2), draw(dtype, n, s, k, o).transpose(1, 2)
            for kind in ("two_sided", "rademacher") if s < 16 else ("two_sided",):
                compare("sketch", a, g, rank, 1 << 40 | 3, 11, kind, "auto")
    assert kernels.refuse_sketch(a, g, 8, 0, 0, "sjlt") and kernels.refuse_sketch(a, g, 8, 0, 0)


def compare_large(n=1 << 16, m=32_769, i=16_400):
    """Results and arguments of more than 2^31 numbers, compared where the last of them lie."""
    left = draw(torch.bfloat16, n, 1, 16), draw(torch.bfloat16, n, 1, 1, 16)
    right = draw(torch.bfloat16, m, 1, 16), draw(torch.bfloat16, m, 1, 1, 16)
    last = slice(n - 3, n)
    want = ops.ntk_gram.op.body(*(x[last] for x in left), *right)
    torch.testing.assert_close(module("gram").ntk_gram(*left, *right)[last], want, rtol=1e-4, atol=1e-4)
    sums = module("gram").ntk_gram_sum(*([x] for x in (*left, *right)), [False])
    torch.testing.assert_close(sums[last], want, rtol=1e-4, atol=1e-4)
    del sums
    count = (n * m) // i + 5
    a = torch.zeros(count, 1, i, dtype=torch.bfloat16, device=DEVICE)
    g, t = draw(torch.bfloat16, count, 1, 1, 2), draw(torch.bfloat16, 1, 2, i)
    a[-3:] = draw(torch.bfloat16, 3, 1, i)
    got = module("products").jvp(a, g, t)
    torch.testing.assert_close(got[-3:], ops.jvp.op.body(a[-3:], g[-3:], t), rtol=1e-4, atol=1e-2)
    got, c = module("products").vjp(a, g, g[:, :, 0]), g[-3:, :, 0]
    torch.testing.assert_close(got, ops.vjp.op.body(a[-3:], g[-3:], c), rtol=1e-4, atol=1e-2)
    for kind in ("two_sided", "rademacher"):
        got = module("sketching").sketch(a, g, 4, 0, 0, kind)
        want = ops.sketch.op.body(a[-3:], g[-3:], 4, 0, 0, kind)
        torch.testing.assert_close(got[-3:], want, rtol=1e-4, atol=1e-1)


def exact_solve(kernel, right):
    """Gaussian elimination in the longest floating type."""
    m = len(right)
    rows = np.concatenate([kernel, right[:, None]], 1)
    for j in range(m):
        pivot = j + int(np.argmax(np.abs(rows[j:, j])))
        rows[[j, pivot]] = rows[[pivot, j]]
        for other in range(m):
            if other != j:
                rows[other] -= rows[j] * (rows[other, j] / rows[j, j])
    return rows[:, m] / np.diag(rows[:, :m])


def compare_removal():
    kernels = module("removal")
    shapes = [(1, 1, 1, 1), (7, 1, 129, 3), (33, 2, 65, 8), (5, 3, 17, 2), (3, 4, 300, 17), (65, 1, 31, 0)]
    for count, m, r, q in shapes:
        for dtype in (torch.float64, torch.float32):
            u = torch.linalg.qr(torch.randn(max(count * m, r), r, dtype=torch.float64))[0][: count * m]
            u = u.reshape(count, m, r).to(dtype).transpose(0, 2).contiguous().transpose(0, 2)
            s, g, rest, r0 = torch.rand(r) * 3, torch.randn(r), torch.randn(count, m), torch.randn(count, m)
            wide = u.double()
            null = 1.5 * torch.eye(m, dtype=torch.float64) - wide @ wide.transpose(1, 2)
            s, g, rest, r0 = (x.double() for x in (s, g, rest, r0))
            poles = torch.complex(-torch.rand(q) - 0.1, torch.rand(q)).to(torch.complex128)
            residues = torch.complex(torch.randn(q), torch.randn(q)).to(torch.complex128)
            args = [x.to(DEVICE) for x in (u, s, g, rest, null)]
            more = [x.to(DEVICE) for x in (r0, poles, residues)]
            with poisoned():
                got = [*kernels.converged_removal(*args, 0.3), kernels.rational_removal(*args, *more, 0.7)]
            body = ops.OPS["converged_removal"].body(*args, 0.3), ops.OPS["rational_removal"].body(*args, *more, 0.7)
            long = [x.numpy().astype(np.longdouble) for x in (wide, s, g, rest, null, r0)]
            want = exact_removal(*long, *(x.numpy().astype(np.clongdouble) for x in (poles, residues)))
            for name, mine, theirs, exact in zip(("v", "ridge", "finite"), got, (*body[0], body[1]), want, strict=True):
                assert mine.shape == theirs.shape and mine.dtype == torch.float64
                size = np.abs(exact).max()
                mine, theirs = (float(np.abs(x.cpu().numpy() - exact).max() / size) for x in (mine, theirs))
                assert mine <= 2 * theirs + 4 * np.finfo(float).eps, (name, count, m, r, q, mine, theirs)
    for shape in ((0, 2, 3), (3, 1, 0), (0, 1, 5)):
        u, rest = torch.ones(shape, dtype=torch.float64, device=DEVICE), torch.ones(*shape[:2], device=DEVICE).double()
        args = u, u.new_ones(shape[2]), u.new_ones(shape[2]), rest, u.new_ones(*shape[:2], shape[1])
        poles = torch.full((2,), -1 + 1j, dtype=torch.complex128, device=DEVICE)
        got, want = kernels.converged_removal(*args, 0.3), ops.OPS["converged_removal"].body(*args, 0.3)
        torch.testing.assert_close(got, want)
        got = kernels.rational_removal(*args, rest, poles, poles, 0.7)
        torch.testing.assert_close(got, ops.OPS["rational_removal"].body(*args, rest, poles, poles, 0.7))
    wide = torch.ones(2, 5, 3, dtype=torch.float64, device=DEVICE)
    assert "at most 4" in kernels.refuse_converged_removal(wide, *args[1:], 0.3)


def exact_removal(u, s, g, rest, null, r0, poles, residues):
    v, ridge, finite = np.empty_like(rest), np.empty_like(u[:, 0]), np.empty_like(u[:, 0])
    shift, constant = np.longdouble(0.3), np.longdouble(0.7)
    for b, row in enumerate(u):
        weight = 1 / (s + shift)
        v[b] = exact_solve((row * weight) @ row.T + null[b] / shift, row @ (weight * g) + rest[b] / shift)
        ridge[b] = -weight * (row.T @ v[b])
        finite[b] = -constant * (row.T @ r0[b])
        for pole, residue in zip(poles, residues, strict=True):
            weight = 1 / (s - pole)
            y = exact_solve((row * weight) @ row.T - null[b] / pole, row @ (weight * g) - rest[b] / pole)
            finite[b] -= (residue * weight * (row.T @ y)).real
    return v, ridge, finite


# Compilation ----------------------------------------------------------------------------------------------------------
def launches():
    """(kernel, dtype, constants, warps, stages, sizes divisible by 16, whether it may not spill) of every launch."""
    gram, products, sketching, removal = (module(x) for x in ("gram", "products", "sketching", "removal"))
    even = ("i_size", "o_size")
    for (dtype, kind), both in gram.BLOCKS.items():
        for alone, (m, n, c, warps, stages) in zip((True, False), both, strict=True):
            common = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_C": c, "PRECISION": kind}
            sizes = {"k1": 1, "k2": 1, "s1": 1, "s2": 1} if alone else {}
            for single, p, q in (
                [(True, 1, 1)] if alone else [(True, 1, 1), (False, 1, 1), (False, 4, 4), (False, 1, 2)]
            ):
                if dtype == torch.bfloat16 or p == q and dtype != torch.float16:
                    constants = common | {"PAIR1": p, "PAIR2": q, "SINGLE": single} | sizes
                    yield gram.gram_kernel, dtype, constants, warps, stages, even, alone
    for (dtype, kind), (m, n, c, warps, stages) in gram.SUM_BLOCKS.items():
        for p, q in [(1, 1), (4, 4)]:
            common = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_C": c, "PRECISION": kind, "PAIR1": p, "PAIR2": q}
            if dtype != torch.float16 and (p == 1 or dtype == torch.bfloat16):
                constants = common | {"ALIGNED": 16 // dtype.itemsize}
                yield gram.gram_sum_kernel, dtype, constants, warps, stages, (), p == 1
    for (dtype, kind), (p, o, c, warps, stages) in products.JVP_BLOCKS.items():
        for s, k in [(1, 1), (p, 16)]:
            constants = {"BLOCK_P": p, "BLOCK_S": s, "BLOCK_O": o, "BLOCK_C": c, "OUTPUTS": k, "PRECISION": kind}
            if dtype == torch.float16 and k > 1:
                continue  # as bfloat16
            yield products.jvp_kernel, dtype, constants, warps, stages, (*even, "o_span"), True
    for (dtype, kind), both in products.VJP_BLOCKS.items():
        for k, everything in [(1, True), (products.AT_ONCE, True), (products.AT_ONCE, False)]:
            i, o, p, warps, stages = both[k > 1]
            parts = 0 if dtype != torch.bfloat16 else 2 if k == 1 else 3
            constants = {"BLOCK_I": i, "BLOCK_O": o, "BLOCK_P": p, "PARTS": parts, "PRECISION": kind}
            constants |= {"OUTPUTS": k, "ALL": everything} | ({"k": 1, "s": 1} if k == 1 else {})
            yield (
                products.vjp_kernel,
                dtype,
                constants,
                warps,
                stages,
                (*even, "pitch", "span"),
                dtype == torch.bfloat16,
            )
    for dtype, (m, n, c, parts, warps, stages) in sketching.BLOCKS.items():
        for times_g in (False, True):
            constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_C": c, "PARTS": parts, "TIMES_G": times_g}
            divisible = (*even, "x_row", "x_step", "columns")
            yield sketching.project_kernel, dtype, constants, warps, stages, divisible, True
    for dtype, (most, x, y, c, parts, warps, stages) in sketching.OUTER.items():
        for s in (16, most):
            constants = {"BLOCK_S": s, "BLOCK_X": x, "BLOCK_Y": y, "BLOCK_C": c, "PARTS": parts}
            if s == most or dtype == torch.bfloat16:
                divisible = ("o_size", "side", "width", "s_span")
                yield sketching.two_sided_kernel, dtype, constants, warps if s > 16 else 4, stages, divisible, True
    for dtype in (torch.float64, torch.float32):
        for matrix in (True, False):
            m, n, c, warps, stages = removal.MOMENTS[matrix]
            constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_R": c, "MATRIX": matrix}
            yield removal.moments_kernel, dtype, constants, warps, stages, ("r", "columns"), False
            m, n, c, warps, stages = removal.CHANGE[matrix]
            constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_C": c, "MATRIX": matrix}
            yield removal.change_kernel, dtype, constants, warps, stages, ("r", "columns"), True


def compile_all(arch, ones=False):
    """Compile every launch; with ones every size is 1, which a launch makes a constant."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    count, done = 0, set()
    for kernel, dtype, constants, warps, stages, even, clean in launches():
        if ones and (kernel, constants.get("MATRIX"), constants.get("SINGLE")) in done:
            continue
        done.add((kernel, constants.get("MATRIX"), constants.get("SINGLE")))
        removal = "removal" in kernel.fn.__module__
        wide = "fp64" if removal or dtype == torch.float64 else "fp32"
        parameters = list(inspect.signature(kernel.fn).parameters)
        words = ("word", "stream", "seed_low", "seed_high")
        if ones:
            sizes = [x for x in parameters if not x.startswith("p_") and not x.isupper() and x not in words]
            constants = constants | dict.fromkeys(sizes, 1)
        types = {x: "*" + (wide if removal and x != "p_u" else names[dtype]) for x in parameters if x.startswith("p_")}
        special = {"p_out": wide, "p_right": wide, "p_table": "i64"}
        special["p_signs"] = "bf16" if dtype == torch.float32 else names[dtype]
        types |= {x: "*" + special[x] for x in special if x in types}
        types |= dict.fromkeys(constants, "constexpr")
        signature = {x: types.get(x, "i32") for x in parameters}
        places = [
            (j,) for j, x in enumerate(parameters) if signature[x][0] == "*" or (x in even and x not in constants)
        ]
        source = ASTSource(
            fn=kernel, signature=signature, constexprs=constants, attrs={p: [["tt.divisibility", 16]] for p in places}
        )
        built = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
        )
        shared, stack = built.metadata.shared, stack_bytes(built.asm["cubin"])
        count += 1
        assert len(built.asm["ptx"]) > 1000 and shared <= {80: 160, 90: 220}[arch] * 1024, (constants, shared)
        print(kernel.fn.__name__, names[dtype], arch, constants, "shared", shared, "stack", stack)
        allowed = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 160  # older: a few registers
        assert "tf32" in constants.get("PRECISION", "") or "tf32" not in built.asm["ptx"]  # only when asked for
        assert not clean or ones or stack is None or stack <= allowed, (kernel.fn.__name__, dtype, constants, stack)
    print("launches", count)


def stack_bytes(cubin):
    """Local memory of a kernel, where spilled registers go; None without cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", found.stdout)[1])


# Tests ----------------------------------------------------------------------------------------------------------------
def run(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


COMPARISONS = {
    "gram": compare_gram, "products": compare_products, "sketch": compare_sketch, "removal": compare_removal
}  # fmt: skip


@pytest.mark.parametrize("family", COMPARISONS)
def test_interpreted_kernels_agree_with_the_bodies(family):
    assert "compared" in run("cpu", family, TRITON_INTERPRET="1")


@pytest.mark.parametrize("arguments", [("80",), ("90",), ("90", "ones")])
def test_every_launch_compiles_ahead_of_time(arguments, tmp_path):
    assert "launches" in run("compile", *arguments, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_tf32_is_used_only_where_it_was_allowed():
    precision = importlib.import_module("sui_fast.ops._launch").precision
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert precision(torch.float32) == ("tf32" if allowed else "ieee")
            assert precision(torch.float64) == precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    assert "compared" in run("cuda", *COMPARISONS, TRITON_INTERPRET="0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_two_to_the_31_numbers_on_a_gpu():
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    assert "compared" in run("cuda", "large", TRITON_INTERPRET="0")


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "compile":
        compile_all(int(sys.argv[2]), ones="ones" in sys.argv)
    else:
        DEVICE = sys.argv[1]
        for chosen in sys.argv[2:]:
            (compare_large if chosen == "large" else COMPARISONS[chosen])()
        print("compared")
