"""The dual form where little of a sample is beyond the span of the others, and how much of it rounding takes."""

import numpy as np
import pytest
import torch

from sui_fast import leave_one_out
from sui_fast.loo import Remaining, solve
from sui_fast.loo.dual import DualRemoval


def inverse(matrix: np.ndarray) -> np.ndarray:
    """In extended precision, by Gauss and Jordan."""
    n = len(matrix)
    both = np.concatenate([matrix, np.eye(n)], 1).astype(np.longdouble)
    for i in range(n):
        both[i] /= both[i, i]
        others = both[:, i].copy()
        others[i] = 0
        both -= np.outer(others, both[i])
    return both[:, n:]


def problem(n: int, d: int, fall: float, seed: int):
    """(kernel of n samples on d features of unequal size, residual, ||dw||^2 in extended precision); shift 1."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, d)) * np.arange(1.0, d + 1) ** -fall * 10.0 ** rng.uniform(-0.5, 0.5, (n, 1))
    theta, r0 = 9 * rows @ rows.T, rng.standard_normal(n)
    exact = inverse(theta + np.eye(n))
    v = exact @ r0 / exact.diagonal()
    return theta, r0, ((exact @ theta * exact).sum(1) * v**2).astype(float)


@pytest.mark.parametrize("d, fall", [(60, 1.0), (60, 1.5), (25, 1.5), (100, 1.5)])
def test_rows_show_that_the_dual_form_is_sound(d, fall, monkeypatch):
    """More samples than features: the condition number alone would ask for the spectrum, at six times the cost."""
    by_condition = []
    whole = DualRemoval.rounding.fget
    monkeypatch.setattr(DualRemoval, "rounding", property(lambda self: by_condition.append(whole(self)) or whole(self)))
    theta, r0, expected = problem(200, d, fall, seed=d)
    found = leave_one_out(theta, r0[:, None], reg=1 / 200)
    assert found.diagnostics["form"] == "converged, dual" and by_condition[0] > solve.CHOLESKY_ROUNDING
    np.testing.assert_allclose(found.weight_sqnorm, expected, rtol=solve.CHOLESKY_ROUNDING)


def test_the_estimate_by_rows_covers_the_error():
    """Also where it is so large that the spectrum is taken."""
    for seed, (d, fall, size) in enumerate([(5, 0, 1e4), (20, 0, 30), (60, 2, 1), (150, 1, 1e3)]):
        theta, r0, _ = problem(200, d, fall, seed)
        theta = theta * size
        exact = inverse(theta + np.eye(200))
        share = (exact @ theta * exact).sum(1).astype(float)
        found = leave_one_out(theta, r0[:, None], reg=1 / 200, method="dual")
        error = np.abs(found.weight_sqnorm / np.asarray(found.loo_residual)[:, 0] ** 2 / share - 1).max()
        assert error <= found.rounding_by_rows(torch.from_numpy(theta).diagonal())


def test_what_the_rows_do_not_bear_out_takes_the_spectrum():
    theta, r0, _ = problem(200, 5, 0, seed=0)
    assert leave_one_out(theta * 1e4, r0[:, None], reg=1 / 200).diagnostics["form"] == "converged, primal"


@pytest.mark.parametrize("k", [1, 2])
def test_rows_of_which_nothing_is_left_take_the_spectrum(k):
    """A sample so short that A - A^2 rounds to zero is no sample without gradient."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60 * k, 20))
    rows[: 3 * k] *= 1e-10
    rows[-k:] = 0.0  # this one has none, and its zero is exact
    found = leave_one_out(rows @ rows.T, rng.standard_normal((60, k)), reg=1 / 60, outputs=k)
    assert found.diagnostics["form"] == "converged, primal"
    assert (np.asarray(found.weight_sqnorm)[:-1] > 0).all() and found.weight_sqnorm[-1] == 0


def test_samples_that_leave_one_after_the_other():
    """More samples than features: a fresh factor where down-dates are in doubt, and not the spectrum."""
    theta, r0, expected = problem(200, 60, 1.5, seed=60)
    remaining = Remaining(torch.from_numpy(theta), torch.from_numpy(r0)[:, None], reg=1 / 200)
    np.testing.assert_allclose(remaining.removal().weight_sqnorm.numpy(), expected, rtol=solve.CHOLESKY_ROUNDING)
    for gone in ([3, 150], [0, 1, 2], [199]):
        remaining.drop(gone)
        kept, found = remaining.kept, remaining.removal()
        assert found.diagnostics["form"] == "converged, dual"
        exact = inverse(theta[np.ix_(kept, kept)] + np.eye(len(kept)))
        v = exact @ r0[kept] / exact.diagonal()
        expected = ((exact @ theta[np.ix_(kept, kept)] * exact).sum(1) * v**2).astype(float)
        np.testing.assert_allclose(found.weight_sqnorm.numpy(), expected, rtol=solve.CHOLESKY_ROUNDING)
    hard = Remaining(torch.from_numpy(problem(200, 5, 0, seed=0)[0] * 1e4), torch.from_numpy(r0)[:, None], reg=1 / 200)
    assert hard.removal().diagnostics["form"] == "converged, primal"
