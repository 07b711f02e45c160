"""All leave-one-out removals at once against one factorisation of the same matrix."""

import pytest
import torch
from _compare import compare
from torch import nn

import sui_fast


def problem(n, digits):
    """Kernel, residual and cross kernel of an MLP on digits (below 5 or not); beyond 1797 samples with noisy copies."""
    x, y = digits
    generator = torch.Generator().manual_seed(0)
    pick = torch.randperm(len(x), generator=generator)
    pick = torch.cat([pick, pick])[: n + 300]
    inputs = x[pick] + 0.05 * torch.randn(n + 300, 64, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 1)).double()
    theta = sui_fast.ntk(model, inputs[:n])
    cross = sui_fast.ntk(model, inputs[n:], inputs[:n])
    return theta, (y[pick[:n]] < 5).double(), cross


def everything(theta, residual, cross, **arguments):
    removal = sui_fast.leave_one_out(theta, residual, cross_ntk=cross, **arguments)
    return removal.weight_sqnorm, removal.prediction_sqnorm


def refit_agrees(theta, residual, cross, *, reg, time=None, lr=None):
    """One sample left out by an eigendecomposition of its own."""
    n, i = len(theta), 7
    keep = torch.arange(n) != i

    def alpha(matrix, right):
        s, u = torch.linalg.eigh(matrix)
        s = s.clamp_min(0) + n * reg
        # lr is the inverse of the largest eigenvalue: rounding may carry the product above 1
        phi = 1 / s if time is None else -torch.expm1(time * torch.log1p(-(lr / n * s).clamp_max(1))) / s
        return u @ (phi * (u.T @ right))

    change = -alpha(theta, residual)
    change[keep] += alpha(theta[keep][:, keep], residual[keep])
    weight, prediction = everything(theta, residual, cross, reg=reg, time=time, lr=lr)
    torch.testing.assert_close(weight[i], change @ theta @ change, rtol=1e-6, atol=0)
    torch.testing.assert_close(prediction[i], (cross @ change).square().mean(), rtol=1e-6, atol=0)


def test_gradient_descent(benchmark, digits):
    case = problem(1000, digits)
    lr = 1000 / float(torch.linalg.eigvalsh(case[0])[-1])
    refit_agrees(*case, reg=0.0, time=2000, lr=lr)
    compare(
        benchmark,
        lambda: everything(*case, time=2000, lr=lr),
        lambda: torch.linalg.eigh(case[0]),
        target=2.0,
        rounds=7,
        shape="n = 1000, k = 1, t = 2000, m = 300; floor: eigh",
    )


@pytest.mark.parametrize("reg", [1e-3, 1e-2])
def test_converged(benchmark, digits, reg):
    case = problem(1000, digits)
    refit_agrees(*case, reg=reg)
    shifted = case[0] + 1000 * reg * torch.eye(1000, dtype=torch.float64)
    compare(
        benchmark,
        lambda: everything(*case, reg=reg),
        lambda: torch.cholesky_inverse(torch.linalg.cholesky(shifted)),
        target=3.0,
        rounds=15,
        shape=f"n = 1000, k = 1, reg = {reg}, m = 300; floor: Cholesky inverse",
    )


def test_scaling(benchmark, digits):
    small, large = problem(1000, digits), problem(2000, digits)
    lr = 1000 / float(torch.linalg.eigvalsh(small[0])[-1])
    compare(
        benchmark,
        lambda: everything(*large, time=2000, lr=lr),
        lambda: everything(*small, time=2000, lr=lr),
        target=9.0,
        rounds=3,
        shape="n = 2000 against n = 1000, t = 2000",
    )
