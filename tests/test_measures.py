"""Measures of ``score`` against their formulas, written out in full weight space."""

import numpy as np
import pytest
import torch
from oracle import Problem, relative_error
from scipy.linalg import solve_continuous_lyapunov

from sui_fast import score

CASES = {"k=1, N<d": (12, 1, 6), "k=1, N>d": (60, 1, 2), "k=3, N<d": (10, 3, 6), "k=3, N>d": (30, 3, 2)}


def network(k: int, hidden: int) -> torch.nn.Module:
    torch.manual_seed(k + hidden)
    return torch.nn.Sequential(torch.nn.Linear(4, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, k)).double()


def autograd_rows(model: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    rows = []
    for output in model(x).flatten():
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(output, list(model.parameters()), retain_graph=True)])
        )
    return torch.stack(rows).numpy()


class Case:
    def __init__(self, name: str):
        n, k, hidden = CASES[name]
        generator = torch.Generator().manual_seed(1)
        self.model = network(k, hidden)
        self.x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(max(k, 2), (n,), generator=generator)
        self.probe = torch.randn(7, 4, generator=generator, dtype=torch.float64)
        self.y = torch.nn.functional.one_hot(self.labels, k).double() if k > 1 else self.labels[:, None].double()
        with torch.no_grad():
            r0 = (self.y - self.model(self.x)).numpy()
        self.problem = Problem(autograd_rows(self.model, self.x), r0, autograd_rows(self.model, self.probe))
        self.n, self.k = n, k

    def score(self, *measures, **arguments):
        return score(self.model, (self.x, self.labels), self.probe, measures=measures, progress=False, **arguments)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("time", [None, 200])
@pytest.mark.parametrize("convention", ["sum", "mean", "iclr2021"])
def test_information_in_weights_and_predictions(case, time, convention):
    arguments = dict(reg=0.01, time=time, lr=None if time is None else 0.02, convention=convention)
    want = case.problem.refit(**arguments)
    got = case.score("si", "fsi", "leverage", "loo_residual", sigma=0.3, **arguments)
    assert relative_error(got["si"], want.weight_sqnorm / (2 * 0.3**2)) < 1e-8
    assert relative_error(got["fsi"], want.prediction_sqnorm / (2 * 0.3**2)) < 1e-8
    assert relative_error(got["leverage"], want.leverage) < 1e-8
    assert relative_error(got["loo_residual"], np.sqrt((want.loo_residual**2).sum(1))) < 1e-8
    for name in ("si", "fsi", "leverage", "loo_residual"):
        assert isinstance(got[name], np.ndarray) and got[name].shape == (case.n,) and got[name].dtype == np.float64


@pytest.mark.parametrize("time", [None, 200])
def test_langevin_metric(case, time):
    arguments = dict(reg=0.01, time=time, lr=None if time is None else 0.02)
    dw = case.problem.refit(**arguments).dw.astype(np.float64)
    jac = case.problem.jacobian
    hessian = jac.T @ jac + case.n * 0.01 * np.eye(jac.shape[1])
    want = np.einsum("bd,de,be->b", dw, hessian, dw) / (2 * 0.5**2)
    assert relative_error(case.score("si_langevin", sigma=0.5, **arguments)["si_langevin"], want) < 1e-8


def sgd_steady_state(case: Case, w: np.ndarray, reg: float, rate: float, jitter: float):
    """Sigma in an orthonormal basis of the row space of J, from SciPy's Lyapunov solver."""
    jac, n, k = case.problem.jacobian, case.n, case.k
    _, s, vt = np.linalg.svd(jac, full_matrices=False)
    basis = vt[s > 1e-7 * s[0]].T
    gradients = (jac * (jac @ w - case.problem.residual.ravel())[:, None]).reshape(n, k, -1).sum(1) @ basis
    centred = gradients - gradients.mean(0)
    covariance = centred.T @ centred / n
    rank = basis.shape[1]
    hessian = basis.T @ jac.T @ jac @ basis + n * reg * np.eye(rank)
    noise = rate * (covariance + jitter * np.trace(covariance) / rank * np.eye(rank))
    return solve_continuous_lyapunov(hessian, noise), basis


@pytest.mark.parametrize("time", [None, 200])
def test_steady_state_of_sgd(case, time):
    """A jitter of 1e-4 keeps the comparison itself well conditioned."""
    arguments = dict(reg=0.01, time=time, lr=None if time is None else 0.02)
    want = case.problem.refit(**arguments)
    sigma, basis = sgd_steady_state(case, want.w.astype(np.float64), 0.01, rate=0.1 / 4, jitter=1e-4)
    delta = want.dw.astype(np.float64) @ basis
    quadratic = np.einsum("br,rb->b", delta, np.linalg.solve(sigma, delta.T)) / (2 * 0.7**2)
    got = case.score("si_sgd", sigma=0.7, sgd_lr=0.1, sgd_batch_size=4, sgd_jitter=1e-4, **arguments)
    assert relative_error(got["si_sgd"], quadratic) < 1e-6


def test_sgd_share_of_the_jitter_is_reported():
    """Orthogonal samples: H is a multiple of I, Sigma has the rank n - 1 of L, the last direction is the jitter's."""
    model = torch.nn.Linear(6, 1, bias=False).double()
    data = (torch.eye(6, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0]))
    arguments = dict(measures="si_sgd", reg=0.01, progress=False)
    small, large = (score(model, data, sgd_jitter=e, **arguments) for e in (1e-9, 1e-8))
    share = np.asarray(small.diagnostics["si_sgd_jitter_share"])
    assert share.shape == (6,) and (share > 0.99).all() and (share < 1 + 1e-9).all()
    np.testing.assert_allclose(small["si_sgd"] / large["si_sgd"], 10, rtol=1e-2)
    many = Case("k=1, N>d").score("si_sgd", reg=0.01)
    assert np.max(many.diagnostics["si_sgd_jitter_share"]) < 1e-2


def test_sgd_defaults():
    case = Case("k=3, N>d")
    plain = case.score("si_sgd", reg=0.01)["si_sgd"]
    np.testing.assert_allclose(case.score("si_sgd", reg=0.01, sgd_lr=1.0, sgd_batch_size=1)["si_sgd"], plain)
    np.testing.assert_allclose(case.score("si_sgd", reg=0.01, sgd_lr=0.5, sgd_batch_size=1)["si_sgd"], 2 * plain)
    np.testing.assert_allclose(case.score("si_sgd", reg=0.01, sgd_batch_size=8)["si_sgd"], 8 * plain)
    np.testing.assert_allclose(case.score("si_sgd", reg=0.01, sigma=2.0)["si_sgd"], plain / 4)
    timed = case.score("si_sgd", reg=0.01, time=100, lr=0.02)["si_sgd"]
    np.testing.assert_allclose(case.score("si_sgd", reg=0.01, time=100, lr=0.02, sgd_lr=0.02)["si_sgd"], timed)


@pytest.mark.parametrize("time", [None, 200])
def test_margin_of_the_model_trained_without(case, time):
    arguments = dict(reg=0.01, time=time, lr=None if time is None else 0.02)
    without = (case.y.numpy() - case.problem.refit(**arguments).loo_residual).astype(np.float64)
    labels = case.labels.numpy()
    if case.k == 1:
        want = (2 * labels - 1) * (2 * without[:, 0] - 1)
    else:
        want = [f[c] - np.delete(f, c).max() for f, c in zip(without, labels, strict=True)]
    np.testing.assert_allclose(case.score("loo_margin", **arguments)["loo_margin"], want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("convention", ["sum", "mean"])
@pytest.mark.parametrize("time", [None, 200])
def test_automatic_regularisation(case, time, convention):
    """The curve is the exact leave-one-out error of every regularisation; the smallest is taken and used."""
    arguments = dict(time=time, lr=None if time is None else 0.02, convention=convention)
    got = case.score("si", "loo_residual", reg="auto", **arguments)
    curve = got.diagnostics["reg_curve"]
    regs, errors = np.asarray(curve["reg"]), np.asarray(curve["loo_error"])
    assert len(regs) >= 8 and (np.diff(np.log(regs[regs > 0])) > 0).all()
    chosen = float(regs[errors.argmin()])
    assert got.settings["reg"] == chosen
    for index in {0, len(regs) // 2, int(errors.argmin()), len(regs) - 1}:
        if time is not None and 0.02 * (case.problem.lambda_max / case.n + regs[index]) >= 2:
            continue
        want = float((case.problem.refit(reg=regs[index], **arguments).loo_residual ** 2).sum(1).mean())
        assert min(abs(errors[index] / want - 1), abs(errors[index] * case.k / want - 1)) < 1e-6
    fixed = case.score("si", reg=chosen, **arguments)
    assert relative_error(got["si"], fixed["si"]) < 1e-8


def test_units_and_order():
    case = Case("k=3, N<d")
    names = ("fsi", "loo_margin", "si", "leverage")
    got = case.score(*names, reg=0.01)
    assert tuple(got.values) == names
    assert all(np.array_equal(got[name], got.values[name]) for name in names)
