"""The curve of reg="auto" from one pass against removal at every regularisation."""

import numpy as np
import pytest
import torch
from oracle import make_problem

from sui_fast.loo import loo_error_curve, make_blocks, make_filter, remove_from_spectrum
from sui_fast.spectra import dense_spectrum


@pytest.mark.parametrize("convention", ["sum", "mean", "iclr2021"])
@pytest.mark.parametrize("k", [1, 3])
def test_errors_are_those_of_removal(k, convention):
    problem = make_problem(30, k, 60, duplicates="near", seed=k)
    theta, r0 = torch.from_numpy(problem.ntk), torch.from_numpy(problem.residual).reshape(30, k)
    theta[:k] = theta[:, :k] = 0.0
    spectrum, idle, blocks = dense_spectrum(theta), (theta == 0).all(1), make_blocks(30, k)
    training = dict(time=None, lr=None, dynamics="gd")
    seen = []

    def error(part, v):
        seen.append(v)
        return v.abs().sum(1)

    regs, errors = loo_error_curve(spectrum, r0, blocks, idle, convention=convention, error=error, **training)
    assert len(regs) == len(errors) == len(seen) == 31
    for reg, found, v in zip(regs[::3], errors[::3], seen[::3], strict=True):
        removal = remove_from_spectrum(
            spectrum, make_filter(30, reg=float(reg), **training), r0, cross=None, blocks=blocks,
            convention=convention, as_numpy=False, idle=idle,
        )  # fmt: skip
        np.testing.assert_allclose(v, removal.loo_residual, rtol=1e-7, atol=1e-9)
        assert np.isclose(found, float(removal.loo_residual.abs().sum(1).mean()), rtol=1e-8)
