"""C++ kernels against what they cannot avoid, against their PyTorch bodies and against what else PyTorch offers."""

import functools
import math
import random
import time

import pytest
import torch
from _compare import compare

import sui_fast
from sui_fast import ops
from sui_fast.ops.sketching import _cpu as sketches
from sui_fast.ops.sketching._tensor_cpu import hashed


def body(op, *args):
    return op.op.body(*args)


def kernel(op, *args):
    with sui_fast.use_backend("cpu"):
        return op(*args)


def seconds(call, rounds=3) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times[1:])


def removal(n, rank, k, poles=13):
    rng = torch.Generator().manual_seed(k)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    u = draw(n, k, rank) / (n * k) ** 0.5
    null = torch.eye(k, dtype=torch.float64) - u @ u.transpose(1, 2)
    p = torch.complex(-draw(poles).abs() - 0.1, draw(poles).abs())
    return u, draw(rank).abs(), draw(rank), draw(n, k), null, draw(n, k), p, p.conj() * 0.3, 0.1


@pytest.mark.parametrize("k", [1, 3, 10])
def test_converged_kernel(benchmark, k):
    args = (*removal(20_000, 1024, k)[:5], 0.1)
    for got, want in zip(kernel(ops.converged_removal, *args), body(ops.converged_removal, *args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    out = torch.empty(20_000, 1024, dtype=torch.float64)
    compare(
        benchmark,
        lambda: kernel(ops.converged_removal, *args),
        lambda: (args[0].sum(), out.fill_(0.0)),
        body=lambda: body(ops.converged_removal, *args),
        gain=4.0,
        rounds=3,
        shape=f"n = 20000, r = 1024, k = {k}",
        floor_name="reading u and writing the result",
    )


@pytest.mark.parametrize("k", [1, 3, 10])
def test_rational_kernel(benchmark, k):
    args = removal(20_000, 1024, k)
    few = (args[0][:200], *args[1:3], *(x[:200] for x in args[3:6]), *args[6:])
    torch.testing.assert_close(
        kernel(ops.rational_removal, *few), body(ops.rational_removal, *few), rtol=1e-8, atol=1e-10
    )
    table, rows = torch.randn(1024, 26, dtype=torch.float64), args[0].reshape(-1, 1024)
    compare(
        benchmark,
        lambda: kernel(ops.rational_removal, *args),
        lambda: [rows @ table for _ in range((k + 3) // 2 + 1)],
        body=lambda: body(ops.rational_removal, *args),
        gain=4.0,
        rounds=1 if k > 1 else 5,
        shape=f"n = 20000, r = 1024, k = {k}, 13 poles",
        floor_name="bare products of all features with the poles' table, and back",
    )


@pytest.mark.parametrize("k", [1, 3])
def test_rational_sums(benchmark, k):
    n, rank, rows = 20_000, 512, 300
    u, s, g, _, _, r0, *filter_ = removal(n, rank, k)
    factor = torch.triu(torch.randn(rank, rank, dtype=torch.float64))[:rows].contiguous()
    args = (u, s, g, r0, True, *filter_, g * 0.1, g * 0.3, factor)
    few = (u[:200], s, g, r0[:200], *args[4:])
    for got, want in zip(kernel(ops.rational_sums, *few), body(ops.rational_sums, *few), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    compare(
        benchmark,
        lambda: kernel(ops.rational_sums, *args),
        lambda: args[0][:, 0] @ args[-1].T,
        body=lambda: body(ops.rational_sums, *args),
        rounds=3,
        shape=f"n = {n}, r = {rank}, k = {k}, 13 poles, {rows} rows of the factor",
        floor_name="the product with the factor",
    )


@pytest.mark.parametrize("rank", [512, 1024])
def test_triangular(benchmark, rank):
    c, x = torch.randn(rank, rank, dtype=torch.float64).triu(), torch.randn(10_000, rank, dtype=torch.float64)
    args = (c, x)
    torch.testing.assert_close(kernel(ops.triangular_sqnorm, *args), body(ops.triangular_sqnorm, *args))
    compare(
        benchmark,
        lambda: kernel(ops.triangular_sqnorm, *args),
        lambda: x @ c[: rank // 2].T,
        body=lambda: body(ops.triangular_sqnorm, *args),
        rounds=5,
        shape=f"n = 10000, r = {rank}",
        floor_name="a product with half of the factor",
    )


@pytest.mark.parametrize("sizes", [(64, 30, 42, 300), (64, 30, 126, 700)])
def test_products(benchmark, sizes):
    b, t, v, p = sizes
    args = tuple(torch.randn(*shape, dtype=torch.float64) for shape in ((b, t, v), (b, v, p), (t, p)))
    torch.testing.assert_close(kernel(ops.product_sqnorm, *args), body(ops.product_sqnorm, *args))
    compare(
        benchmark,
        lambda: kernel(ops.product_sqnorm, *args),
        lambda: args[0] @ args[1],
        body=lambda: body(ops.product_sqnorm, *args),
        rounds=9,
        shape=f"{b} products of {t} x {v} and {v} x {p}",
        floor_name="the products alone",
    )


def test_sjlt(benchmark):
    n, d, rank = 64, 10_000_000, 4096
    a, g = torch.ones(n, 1, 1), torch.randn(n, 1, 1, d)
    place, sign = hashed(d, rank, 2, 0, 0, torch.float32)
    place, rows = place.long(), g.view(n, d)
    want = torch.zeros(n, rank, dtype=torch.float64).index_add_(1, place[:100_000], (rows * sign)[:, :100_000].double())
    part = torch.nn.functional.pad(g[..., :100_000], (0, 1))
    got = kernel(ops.sketch, a, part, rank, 0, 0, "sjlt")[:, 0]
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    expanded, table = place.expand(n, d), torch.sparse_csr_tensor(torch.arange(d + 1), place, sign, (d, rank))
    rivals = {  # the first two are spared the signs
        "index_add": lambda: torch.zeros(n, rank).index_add_(1, place, rows),
        "scatter_add": lambda: torch.zeros(n, rank).scatter_add_(1, expanded, rows),
        "sparse product": lambda: rows @ table,
    }
    best = min(rivals, key=lambda name: seconds(rivals[name], 1))
    compare(
        benchmark,
        lambda: kernel(ops.sketch, a, g, rank, 0, 0, "sjlt"),
        lambda: rows.sum(),
        body=rivals[best],
        gain=3.0,
        rounds=3,
        shape=f"n = 64, 10 million entries to 4096, against {best}, the fastest of {len(rivals)}",
        floor_name="reading the gradients",
    )


def test_tensor_sketch(benchmark):
    n, s, i, o, rank = 64, 64, 4096, 2560, 4096
    a, g = torch.randn(n, s, i), torch.randn(n, 1, s, o)
    for route in ("fft", "scatter"):
        torch.testing.assert_close(
            kernel(ops.sketch, a[:2], g[:2], rank, 0, 0, "tensor", route),
            body(ops.sketch, a[:2].double(), g[:2].double(), rank, 0, 0, "tensor", route).float(),
            rtol=1e-4,
            atol=1e-2,
        )
    place = torch.randint(0, rank, (i * o,))

    def formed():
        out = torch.zeros(n, rank)
        for b in range(n):
            out[b : b + 1].index_add_(1, place, (g[b, 0].T @ a[b]).reshape(1, -1))
        return out

    compare(
        benchmark,
        lambda: kernel(ops.sketch, a, g, rank, 0, 0),
        lambda: [torch.fft.rfft(torch.ones(64, rank)) for _ in range(2 * n)],
        body=formed,
        gain=3.0,
        rounds=3,
        shape="4096 -> 2560, n = 64, s = 64, r = 4096, against rows and index_add",
        floor_name="the transforms alone",
    )


def test_routes(benchmark):
    """Chosen route against the better of the two over a random grid: the slowest choice is the figure."""
    rng, found = random.Random(0), []
    while len(found) < 40:
        s, rank = rng.choice([1, 4, 16, 64, 256]), rng.choice([256, 1000, 1024, 1531, 4096])
        i, o = (rng.choice([10, 27, 64, 144, 384, 1024, 2048]) for _ in range(2))
        if o * i * (1 + 0.015 * s) > 5e7:
            continue
        n = max(1, min(16, int(1e8 / (o * i * (1 + 0.015 * s) + 3 * s * rank))))
        a, g = torch.randn(n, s, i), torch.randn(n, 1, s, o)
        args = (a, g, rank, 0, 0, "tensor")
        times = {r: seconds(functools.partial(kernel, ops.sketch, *args, r)) for r in ("fft", "scatter")}
        chosen = "fft" if sketches.fft_is_cheaper(n, s, i, o, 1, rank) else "scatter"
        found.append((times[chosen] / min(times.values()), (s, i, o, rank), times))
    ratio, shape, times = max(found)
    benchmark.extra_info.update(
        seconds=ratio * min(times.values()),
        floor_seconds=min(times.values()),
        floor_name="the better route",
        ratio=ratio,
        target=1.3,
        shape=f"40 shapes; worst: s, i, o, r = {shape}",
    )
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)


@pytest.mark.parametrize("sizes", [(64, 64, 4096, 2560, 4096), (64, 64, 384, 384, 1024), (256, 1, 512, 512, 4096)])
def test_two_sided(benchmark, sizes):
    n, s, i, o, rank = sizes
    a, g, side = torch.randn(n, s, i), torch.randn(n, 1, s, o), math.isqrt(rank)
    left, right = torch.randn(o, rank // side), torch.randn(i, side)
    args = (a, g, rank, 0, 0, "two_sided", "auto")
    torch.testing.assert_close(kernel(ops.sketch, *args), body(ops.sketch, *args), rtol=1e-3, atol=1e-2)
    compare(
        benchmark,
        lambda: kernel(ops.sketch, *args),
        lambda: torch.matmul((g @ left).transpose(2, 3), (a @ right)[:, None]),
        target=1.3,
        body=lambda: body(ops.sketch, *args),
        rounds=9,
        shape=f"n = {n}, s = {s}, {i} -> {o}, r = {rank}",
        floor_name="its bare products",
    )


def test_rademacher(benchmark):
    n, i, o, rank = 256, 256, 256, 1024
    a, g = torch.randn(n, 1, i), torch.randn(n, 1, 1, o)
    rows, table = torch.randn(n, i * o), torch.randn(i * o, rank)
    args = (a, g, rank, 0, 0, "rademacher", "auto")
    torch.testing.assert_close(kernel(ops.sketch, *args), body(ops.sketch, *args), rtol=1e-3, atol=1e-2)
    compare(
        benchmark,
        lambda: kernel(ops.sketch, *args),
        lambda: rows @ table,
        body=lambda: body(ops.sketch, *args),
        rounds=3,
        shape=f"n = {n}, {i} -> {o}, r = {rank}",
        floor_name="the product with a given table",
    )


def test_dispatch(benchmark):
    """What a call costs beyond the function it runs."""
    args = (torch.randn(2, 1, 3), torch.randn(2, 1, 1, 2), torch.randn(2, 2, 3))
    count = 2000

    def loop(function):
        def run():
            for _ in range(count):
                function(*args)

        return run

    compare(benchmark, loop(ops.jvp), loop(ops.jvp.op.body), rounds=9, shape="", floor_name="2000 calls of the body")
    info = benchmark.extra_info
    each = (info["seconds"] - info["floor_seconds"]) / count * 1e6
    info["shape"] = f"2000 calls of jvp: {each:.1f} microseconds a call (at most 15)"
