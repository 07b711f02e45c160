"""A training set that shrinks: down-dated inverses against fresh ones."""

import numpy as np
import pytest
import torch
from oracle import make_problem, relative_error

from sui_fast import ArgumentError, leave_one_out
from sui_fast.loo import Remaining

SETTINGS = {
    "converged": dict(reg=0.05),
    "small reg": dict(reg=1e-4),
    "ridgeless": dict(),
    "gd": dict(time=50, lr=0.3, reg=0.01),
    "flow": dict(time=20.0, lr=0.3, dynamics="flow"),
    "mean": dict(reg=0.05, convention="mean"),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_down_dating_equals_starting_over(setting, k):
    n, options = 24, SETTINGS[setting]
    problem = make_problem(n, k, 100, duplicates="near" if options.get("reg") or "time" in options else "no", seed=k)
    theta, r0, cross = (torch.from_numpy(x) for x in (problem.ntk, problem.residual, problem.cross_ntk))
    remaining = Remaining(theta, r0, cross=cross, **options)
    remaining.removal()
    for gone in ([3, 20], [0], [5, 6, 7, 8], [23]):
        remaining.drop(gone)
        kept = remaining.kept
        rows = (kept[:, None] * k + np.arange(k)).ravel()
        changed = dict(options)
        scale = 1.0 if options.get("convention") == "mean" else n / len(kept)
        changed["reg"] = options.get("reg", 0.0) * scale  # the summed loss keeps its lambda and eta
        if "lr" in options:
            changed["lr"] = options["lr"] * len(kept) / n
        fresh = leave_one_out(
            problem.ntk[np.ix_(rows, rows)], problem.residual[kept], cross_ntk=problem.cross_ntk[:, rows], **changed
        )
        found = remaining.removal()
        for name in ("weight_sqnorm", "prediction_sqnorm", "loo_residual"):
            assert relative_error(getattr(found, name).numpy(), getattr(fresh, name)) < 1e-8, (name, gone)
    if setting == "converged":
        assert remaining.factorisations == 1


def test_rescaling_follows_the_mean_loss():
    problem = make_problem(20, 1, 60)
    theta, r0 = torch.from_numpy(problem.ntk), torch.from_numpy(problem.residual)
    remaining = Remaining(theta, r0, reg=0.1)
    remaining.drop(np.arange(10))
    remaining.rescale()
    fresh = leave_one_out(problem.ntk[10:, 10:], problem.residual[10:], reg=0.1)
    assert relative_error(remaining.removal().weight_sqnorm.numpy(), fresh.weight_sqnorm) < 1e-10


def test_a_sample_leaves_once():
    problem = make_problem(6, 1, 20)
    remaining = Remaining(torch.from_numpy(problem.ntk), torch.from_numpy(problem.residual), reg=0.1)
    remaining.drop([2])
    with pytest.raises(ArgumentError, match="samples"):
        remaining.drop([2, 3])
    remaining.drop([0, 1, 3, 4, 5])
    with pytest.raises(ArgumentError, match="samples"):
        remaining.removal()
