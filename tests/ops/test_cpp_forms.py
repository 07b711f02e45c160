"""The C++ kernels of quadratic forms, alone and behind the rational removal, against plain products."""

import os
import subprocess
import sys

import pytest
import torch

_cpu = pytest.importorskip("sui_fast._cpu", reason="the C++ module is not built")
forms = pytest.importorskip("sui_fast.ops.forms._cpu")
removal = pytest.importorskip("sui_fast.ops.removal._cpu")

import sui_fast  # noqa: E402
from sui_fast import ops  # noqa: E402
from sui_fast._errors import ArgumentError  # noqa: E402

SHAPES = [  # vectors, rows of the factor, columns
    pytest.param(1, 1, 1, id="all-one"),
    pytest.param(25, 7, 9, id="odd"),
    pytest.param(100, 33, 64, id="wide"),
    pytest.param(203, 130, 131, id="large"),
    pytest.param(30, 140, 389, id="chunks"),
    pytest.param(26, 256, 256, id="whole-chunks"),
    pytest.param(0, 3, 5, id="no-vectors"),
    pytest.param(4, 0, 5, id="no-factor"),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("n, p, r", SHAPES)
def test_triangular_forms(n, p, r):
    c, x = draw(p, r), draw(n, r, seed=1)  # what lies below the diagonal is not read
    want = (x @ c.triu().T).square().sum(1)
    torch.testing.assert_close(forms.triangular_sqnorm(c, x), want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ops.triangular_sqnorm.op.body(c, x), want, rtol=1e-12, atol=1e-13)
    turned = x.T.contiguous().T
    torch.testing.assert_close(forms.triangular_sqnorm(c, turned), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n, p, r", SHAPES)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("poles", [0, 1, 2, 5])
@pytest.mark.parametrize("outside", [False, True])
def test_sums_over_the_change(n, p, r, m, poles, outside):
    if m > r and poles and not outside:
        pytest.skip("as few eigenvectors cannot tell as many rows apart")
    u, g, r0 = draw(n, m, r) / (2 * r**0.5), draw(r), draw(n, m, seed=2)
    poles, residues = torch.complex(-draw(poles).square() - 0.3, draw(poles)), torch.complex(draw(poles), draw(poles))
    rest, null = r0 - u @ g, torch.eye(m, dtype=u.dtype) - u @ u.mT
    if not outside:
        rest, null = torch.zeros_like(rest), torch.zeros_like(null)
    s, base, trained, c = draw(r).square(), 0.1 * draw(r, seed=3), draw(r, seed=4), draw(p, r)
    coef = base + ops.rational_removal.op.body(u, s, g, rest, null, r0, poles, residues, 0.7)
    reached = torch.einsum("bmr,r,br->bm", u, s, coef + trained)
    want = reached, coef.square() @ s, (coef @ c.triu().T).square().sum(1)
    for function in (removal.rational_sums, ops.rational_sums.op.body):
        found = function(u, s, g, r0, outside, poles, residues, 0.7, base, trained, c)
        for got, expected in zip(found, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_a_single_row_that_cannot_leave_is_an_error():
    u, r0 = torch.zeros(30, 1, 9, dtype=torch.float64), draw(30, 1)
    u[:, 0, 0] = 1
    u[17] = 0  # no eigenvectors, and nothing beside them: 0 / 0
    pole, residue = (torch.tensor([x + 0j], dtype=torch.complex128) for x in (-0.5, 1.0))
    arguments = (draw(9).square(), draw(9), r0, False, pole, residue, 0.0, draw(9), draw(9), draw(3, 9))
    with pytest.raises(torch.linalg.LinAlgError, match="1 of 30 removed blocks"):
        removal.rational_sums(u, *arguments)


@pytest.mark.parametrize(
    "b, t, v, p", [(1, 1, 1, 1), (3, 29, 7, 61), (2, 8, 5, 24), (2, 9, 20, 7), (4, 3, 0, 5), (0, 3, 2, 5), (2, 3, 2, 0)]
)
def test_squared_rows_of_products(b, t, v, p):
    a, m, base = draw(b, t, v), draw(b, v, p), draw(t, p)
    want = (base + a @ m).square().sum(2)
    for function in (forms.product_sqnorm, ops.product_sqnorm.op.body):
        torch.testing.assert_close(function(a, m, base), want, rtol=1e-12, atol=1e-13)
    inside = torch.zeros(b, v + 2, p + 3, dtype=torch.float64)
    inside[:, 1:-1, 2:-1] = m
    torch.testing.assert_close(forms.product_sqnorm(a, inside[:, 1:-1, 2:-1], base), want, rtol=1e-12, atol=1e-13)
    turned = [x.mT.contiguous().mT for x in (a, m, base)]
    torch.testing.assert_close(forms.product_sqnorm(*turned), want, rtol=1e-12, atol=1e-13)


def test_threads_change_nothing():
    c, x = draw(150, 200), draw(701, 200)
    expected = forms.triangular_sqnorm(c, x)
    factors = draw(40, 30, 90), draw(40, 90, 200), draw(30, 200)
    products = forms.product_sqnorm(*factors)
    torch.set_num_threads(3)
    try:
        torch.testing.assert_close(forms.triangular_sqnorm(c, x), expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(forms.product_sqnorm(*factors), products, rtol=0, atol=0)
    finally:
        torch.set_num_threads(1)


def test_nan_stays_in_its_row():
    x = draw(50, 20)
    x[7, 19] = float("nan")
    found = forms.triangular_sqnorm(draw(20, 20), x)
    assert found[7].isnan() and torch.isfinite(found[torch.arange(50) != 7]).all()


def test_a_tall_factor_is_an_error():
    with pytest.raises(ArgumentError, match="at most as many rows as columns"):
        sui_fast.ops.triangular_sqnorm(draw(5, 4), draw(3, 4))


@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
def test_other_instruction_sets(instructions):
    names = "test_triangular_forms", "test_sums_over_the_change", "test_squared_rows_of_products"
    selected = [f"{__file__}::{name}" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *selected]
    environment = {**os.environ, "SUI_FAST_CPU": instructions, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "140 passed, 3 skipped" in done.stdout, done.stdout + done.stderr
