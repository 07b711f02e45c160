"""Bodies against plain formulas, and everything a custom op has to survive."""

import math
import time

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import sui_fast
from sui_fast import ops
from sui_fast._errors import ArgumentError, BackendError
from sui_fast.ops.sketching._random import philox

CPU = torch.device("cpu")
EXAMPLES = [(name, number) for name, op in ops.OPS.items() for number in range(len(list(op.examples(CPU))))]
SMOOTH = [
    "jvp", "vjp", "ntk_gram", "ntk_gram_sum", "sketch", "converged_removal", "rational_removal", "rational_sums",
    "triangular_sqnorm", "product_sqnorm",
]  # fmt: skip


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


def example(name, number=0, dtype=torch.float64):
    convert = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    return tree_map_only(torch.Tensor, convert, list(list(ops.OPS[name].examples(CPU))[number]))


def flattened(name):
    """An op as a function of its real tensors alone, and those."""
    values, spec = tree_flatten(example(name))
    real = [j for j, x in enumerate(values) if torch.is_tensor(x) and x.is_floating_point()]

    def function(*tensors):
        given = list(values)
        for j, tensor in zip(real, tensors, strict=True):
            given[j] = tensor
        return getattr(ops, name)(*tree_unflatten(given, spec))

    return function, [values[j] for j in real]


@pytest.mark.parametrize(
    "n,k,s,i,o,r", [(5, 2, 3, 4, 6, 7), (1, 1, 1, 1, 1, 1), (0, 2, 3, 4, 5, 2), (3, 2, 1, 17, 5, 0)]
)
def test_products(n, k, s, i, o, r):
    a, g, t, c = draw(n, s, i), draw(n, k, s, o), draw(r, o, i), draw(n, k, r, seed=3)
    rows = torch.einsum("nkso,nsi->nkoi", g, a)
    torch.testing.assert_close(ops.jvp(a, g, t), torch.einsum("nkoi,roi->nkr", rows, t))
    torch.testing.assert_close(ops.vjp(a, g, c), torch.einsum("nkoi,nkr->roi", rows, c))
    left, right = (ops.jvp(a, g, t) * c).sum(), (ops.vjp(a, g, c) * t).sum()
    torch.testing.assert_close(left, right)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_leaves(found) if torch.is_tensor(x))])
        return found


@pytest.mark.parametrize("n,k,s,i,o,r", [(40, 5, 3, 6, 7, 30), (60, 2, 9, 4, 5, 40), (90, 1, 1, 8, 9, 50)])
def test_products_hold_no_more_than_their_arguments(n, k, s, i, o, r, monkeypatch):
    monkeypatch.setattr(ops.products, "_ELEMENTS", 1)
    a, g, t, c = draw(n, s, i), draw(n, k, s, o), draw(r, o, i), draw(n, k, r, seed=3)
    most = max(x.numel() for x in (a, g, t, c))
    assert most < n * s * r * o / 4
    for op, last in ((ops.jvp, t), (ops.vjp, c)):
        with Largest() as largest:
            got = op.op.body(a, g, last)
        assert largest.size <= most
        rows = torch.einsum("nkso,nsi->nkoi", g, a)
        want = torch.einsum("nkoi,roi->nkr" if op is ops.jvp else "nkoi,nkr->roi", rows, last)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "n,k,s,i,o,r",
    [
        (250, 1, 1, 200, 100, 60),
        (250, 2, 1, 200, 100, 60),
        (256, 10, 1, 60, 50, 20),
        (40, 1, 30, 20, 60, 90),
        (64, 3, 16, 30, 40, 9),
        (1, 2, 1, 9, 8, 50),
    ],
)
def test_what_vjp_holds_is_known(n, k, s, i, o, r, monkeypatch):
    monkeypatch.setattr(ops.products, "_ELEMENTS", 1)
    a, g, c = draw(n, s, i), draw(n, k, s, o), draw(n, k, r, seed=3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.vjp.op.body(a, g, c)
    taken = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    held = np.cumsum([x.nbytes() for x in sorted(taken, key=lambda x: x.start_ns())])
    assert 0.7 < held.max() / 8 / ops.products.vjp_room(n, k, s, i, o, r) <= 1


@pytest.mark.parametrize("s,t,i,o", [(0, 2, 3, 4), (3, 2, 40, 30), (1, 1, 5, 3), (3, 2, 2, 1), (5, 7, 3, 2)])
def test_gram(s, t, i, o):
    a1, g1, a2, g2 = draw(4, s, i), draw(4, 2, s, o), draw(3, t, i), draw(3, 5, t, o)
    rows = [torch.einsum("nkso,nsi->nkoi", g, a).flatten(0, 1).flatten(1) for a, g in ((a1, g1), (a2, g2))]
    torch.testing.assert_close(ops.ntk_gram(a1, g1, a2, g2), rows[0] @ rows[1].T)
    wide = ops.ntk_gram(*(x.bfloat16() for x in (a1, g1, a2, g2)))
    assert wide.dtype == torch.float32
    exact = ops.ntk_gram(*(x.bfloat16().double() for x in (a1, g1, a2, g2)))
    assert float((wide - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


def test_gram_of_several_layers():
    sizes, n, m = [(3, 2, 40, 30), (1, 1, 5, 3), (5, 7, 3, 2), (0, 0, 4, 2)], 4, 3
    a1, g1 = [draw(n, s, i) for s, _, i, _ in sizes], [draw(n, 2, s, o) for s, _, _, o in sizes]
    a2, g2 = [draw(m, t, i) for _, t, i, _ in sizes], [draw(m, 5, t, o) for _, t, _, o in sizes]
    bias = [True, False, True, True]
    want = sum(map(ops.ntk_gram, a1, g1, a2, g2))
    for left, right in ((g1[j].sum(2), g2[j].sum(2)) for j, one in enumerate(bias) if one):
        want = want + left.flatten(0, 1) @ right.flatten(0, 1).T
    torch.testing.assert_close(ops.ntk_gram_sum(a1, g1, a2, g2, bias), want)
    for change, word in [
        (lambda: (a1[:2], g1, a2, g2, bias), "g1 of ntk_gram_sum"),
        (lambda: (a1, g1, a2, g2, bias[:2]), "bias of ntk_gram_sum"),
        (lambda: ([], [], [], [], []), "one or more"),
        (lambda: (a1[0], g1, a2, g2, bias), "a list of tensors"),
        (lambda: (a1, g1, [a2[0][:2], *a2[1:]], g2, bias), r"a2\[1\] of ntk_gram_sum"),
    ]:
        with pytest.raises(ArgumentError, match=word):
            ops.ntk_gram_sum(*change())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_removal_is_the_removal_of_rows(m, backend):
    blocks, rank = 4, 9
    features = draw(blocks * m, rank, seed=m)
    theta, r0 = features @ features.T, draw(blocks * m, seed=1)
    s, u = torch.linalg.eigh(theta)
    keep = s > 1e-10 * s[-1]
    u, s = u[:, keep], s[keep]
    g = u.T @ r0
    block = u.reshape(blocks, m, -1)
    null = torch.eye(m, dtype=torch.float64) - block @ block.transpose(1, 2)
    rest = (r0 - u @ g).reshape(blocks, m)
    poles = torch.tensor([-0.5 + 0.3j, -2.0 + 0j, s[-1].item() + 1 + 2j], dtype=torch.complex128)
    residues = torch.tensor([1.5 - 2j, 3.0 + 0j, 0.5j], dtype=torch.complex128)

    def function(kernel, right):
        eye = torch.eye(len(kernel), dtype=torch.complex128)
        total = 0.3 * right.to(torch.complex128)
        for p, c in zip(poles, residues, strict=True):
            total = total + c * torch.linalg.solve(kernel - p * eye, right.to(torch.complex128))
        return total.real

    with sui_fast.use_backend(backend):
        coef = ops.rational_removal(block, s, g, rest, null, r0.reshape(blocks, m), poles, residues, 0.3)
        v, ridge = ops.converged_removal(block, s, g, rest, null, 0.7)
    for b in range(blocks):
        stay = torch.ones(blocks * m, dtype=torch.bool)
        stay[b * m : (b + 1) * m] = False
        without = torch.zeros_like(r0)
        without[stay] = function(theta[stay][:, stay], r0[stay])
        torch.testing.assert_close(coef[b], u.T @ (without - function(theta, r0)), rtol=1e-8, atol=1e-9)
        shifted = theta + 0.7 * torch.eye(len(theta), dtype=torch.float64)
        without = torch.zeros_like(r0)
        without[stay] = torch.linalg.solve(shifted[stay][:, stay], r0[stay])
        torch.testing.assert_close(ridge[b], u.T @ (without - torch.linalg.solve(shifted, r0)), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(v[b], (r0 - theta @ without)[~stay], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name,number", EXAMPLES)
def test_opcheck(name, number):
    torch.library.opcheck(ops.OPS[name].registered, tuple(list(ops.OPS[name].examples(CPU))[number]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name,number", EXAMPLES)
def test_opcheck_on_a_gpu(name, number):
    torch.library.opcheck(ops.OPS[name].registered, tuple(list(ops.OPS[name].examples(torch.device("cuda")))[number]))


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name):
    function, tensors = flattened(name)
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in tensors], atol=1e-5)


@pytest.mark.parametrize("name,number", EXAMPLES)
def test_whole_graph_compiles(name, number):
    arguments, op = list(ops.OPS[name].examples(CPU))[number], getattr(ops, name)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(op, fullgraph=True, backend="aot_eager")(*arguments), op(*arguments))


@pytest.mark.parametrize("name", SMOOTH)
def test_forward_mode_is_not_silently_zero(name):
    op, arguments = flattened(name)
    step = draw(*arguments[0].shape, seed=9)
    h = 1e-6
    first = lambda x: x[0] if isinstance(x, tuple) else x  # noqa: E731
    numeric = (
        first(op(arguments[0] + h * step, *arguments[1:])) - first(op(arguments[0] - h * step, *arguments[1:]))
    ) / (2 * h)
    assert float(numeric.abs().max()) > 0
    with forward_ad.dual_level():
        out = first(op(forward_ad.make_dual(arguments[0], step), *arguments[1:]))
        tangent = forward_ad.unpack_dual(out).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, numeric, rtol=1e-4, atol=1e-6)
    _, tangent = torch.func.jvp(lambda x: first(op(x, *arguments[1:])), (arguments[0],), (step,))
    torch.testing.assert_close(tangent, numeric, rtol=1e-4, atol=1e-6)


def test_transforms():
    a, g, t = draw(4, 3, 5), draw(4, 2, 3, 6), draw(7, 6, 5)
    single = torch.func.vmap(lambda x: ops.jvp(a, g, x[None])[..., 0])(t)
    torch.testing.assert_close(single.permute(1, 2, 0), ops.jvp(a, g, t))
    rows = torch.func.jacrev(lambda x: ops.jvp(a, g, x[None])[..., 0])(t[0])
    torch.testing.assert_close(rows, torch.einsum("nkso,nsi->nkoi", g, a))


def test_a_named_backend_runs_or_tells_why():
    arguments = example("jvp")
    with sui_fast.use_backend("cpu"), pytest.raises(BackendError, match="jvp has no cpu kernel"):
        ops.jvp(*arguments)
    with sui_fast.use_backend("cuda"), pytest.raises(BackendError):
        ops.ntk_gram(*example("ntk_gram"))
    with pytest.raises(ArgumentError, match="backend"), sui_fast.use_backend("nothing"):
        pass
    with sui_fast.use_backend("reference"):
        assert sui_fast.explain("rational_removal", *example("rational_removal")).backend == "reference"


def test_environment_names_a_backend(monkeypatch):
    monkeypatch.setenv("SUI_FAST_BACKEND", "reference")
    assert sui_fast.explain(ops.rational_removal, *example("rational_removal")).backend == "reference"


def test_explain_gives_reasons():
    found = sui_fast.explain(ops.ntk_gram, *example("ntk_gram"))
    assert found.backend == "reference" and "no cpu kernel" in found.reasons["cpu"] and found.reasons["triton"]
    assert "ntk_gram: reference" in str(found)
    with pytest.raises(ArgumentError, match="op"):
        sui_fast.explain("nothing")


@pytest.mark.parametrize(
    "change,word",
    [
        (lambda a: [a[0][0], *a[1:]], "a of jvp"),
        (lambda a: [a[0], a[1], a[2][:, :-1]], "tangents of jvp"),
        (lambda a: [a[0].float(), *a[1:]], "g of jvp"),
        (lambda a: [a[0].long(), *a[1:]], "a of jvp"),
        (lambda a: [a[0].to("meta"), *a[1:]], "meta"),
        (lambda a: ["x", *a[1:]], "a of jvp"),
    ],
)
def test_the_border_names_the_argument(change, word):
    with pytest.raises(ArgumentError, match=word):
        ops.jvp(*change(example("jvp")))


def test_philox_known_answers():
    zero = philox(torch.tensor([0]), 0, 0, 0)
    assert [f"{int(word):08x}" for word in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = philox(torch.tensor([-1]), 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
    assert [f"{int(word):08x}" for word in ones] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


@pytest.mark.parametrize("s,i,o,rank", [(1, 7, 5, 16), (6, 7, 5, 17), (3, 30, 20, 8), (2, 4, 4, 1)])
def test_routes_of_the_tensor_sketch_agree(s, i, o, rank):
    a, g = draw(3, s, i), draw(3, 2, s, o)
    fft, scatter = (ops.sketch(a, g, rank, 5, 2, "tensor", route) for route in ("fft", "scatter"))
    torch.testing.assert_close(fft, scatter, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.sketch(a, g, rank, 5, 2), scatter, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["tensor", "sjlt", "rademacher", "two_sided"])
def test_sketch_is_unbiased_and_the_same_for_every_batch(kind):
    a, g = draw(3, 2, 6), draw(3, 2, 2, 5)
    theta = ops.ntk_gram(a, g, a, g)
    trials = 600
    grams = torch.stack([(z := ops.sketch(a, g, 16, seed, 1, kind).flatten(0, 1)) @ z.T for seed in range(trials)])
    error = (grams.mean(0) - theta).abs() / (grams.std(0) / math.sqrt(trials) + 1e-12)
    assert float(error.max()) < 5
    whole = ops.sketch(a, g, 16, 3, 1, kind)
    parts = torch.cat([ops.sketch(a[b : b + 1], g[b : b + 1], 16, 3, 1, kind) for b in range(3)])
    torch.testing.assert_close(whole, parts)
    assert not torch.equal(whole, ops.sketch(a, g, 16, 3, 2, kind))


def test_sketch_arguments():
    a, g = draw(3, 2, 6), draw(3, 2, 2, 5)
    for bad in ((0, 0, 0, "tensor", "auto"), (4, 0, 0, "x", "auto"), (4, 0, 0, "tensor", "x")):
        with pytest.raises(ArgumentError):
            ops.sketch(a, g, *bad)


@pytest.mark.parametrize("fault", ["wrong", "fails", "dtype"])
def test_a_kernel_that_disagrees_is_put_aside(fault, monkeypatch):
    pytest.importorskip("sui_fast._cpu")
    op, arguments = ops.sketch.op, example("sketch")
    kernel = op.kernel("cpu")
    good = kernel.sketch

    def bad(*args):
        if fault == "fails":
            raise RuntimeError("no such instruction")
        found = good(*args)
        return found * 1.001 if fault == "wrong" else found.double()

    monkeypatch.setattr(op, "_trusted", {})
    monkeypatch.setattr(kernel, "sketch", bad)
    with pytest.warns(RuntimeWarning, match="the cpu kernel of sketch is put aside"):
        got = ops.sketch(*arguments)
    assert torch.equal(got, op.body(*arguments)) and ops.explain("sketch", *arguments).backend == "reference"
    with sui_fast.use_backend("cpu"), pytest.raises(BackendError):
        ops.sketch(*arguments)


def test_self_tests_are_short():
    for op in ops.OPS.values():
        for backend in op.kernels:
            if ops.backends()[backend] is None and not isinstance(op.kernel(backend), str):
                times = []
                for _ in range(3):
                    start = time.process_time()
                    assert op._compare(backend, CPU if backend == "cpu" else torch.device("cuda", 0)) is None
                    times.append(time.process_time() - start)
                assert min(times) <= 0.02, (op.name, backend, times)


def test_self_test_and_backends():
    assert ops.backends()["reference"] is None
    assert all(reason is None for tests in ops.self_test().values() for reason in tests.values())
