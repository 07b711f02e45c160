"""The guarded eigendecomposition."""

import numpy as np
import pytest
import torch

import sui_fast.spectra.dense as dense
from sui_fast._errors import SpectrumError
from sui_fast.spectra import dense_spectrum


def kernel(n=30, d=12, scale=1.0):
    rows = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return scale * rows @ rows.T


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_rank_deficient_kernel_is_reconstructed_and_clamped(scale):
    theta = kernel(scale=scale)
    spectrum = dense_spectrum(theta)
    assert spectrum.rank == 12
    assert float(((spectrum.u * spectrum.s) @ spectrum.u.T - theta).abs().max()) < 1e-13 * float(theta.abs().max())
    assert (spectrum.s[:18] == 0).all()
    assert spectrum.error < 1e-14


def test_real_negative_eigenvalues_are_refused():
    with pytest.raises(SpectrumError, match="positive semi-definite"):
        dense_spectrum(kernel() - 0.01 * torch.eye(30, dtype=torch.float64))


def test_float32_rounding_is_rounding_only_when_declared():
    theta = kernel().float().double()
    assert dense_spectrum(theta, precision=2.0**-23).rank == 12
    with pytest.raises(SpectrumError):
        dense_spectrum(theta + 1e-5 * torch.diag(torch.linspace(-1, 1, 30, dtype=torch.float64)))


def test_zero_and_single():
    assert dense_spectrum(torch.zeros(3, 3, dtype=torch.float64)).rank == 0
    assert dense_spectrum(torch.full((1, 1), 4.0, dtype=torch.float64)).top == 4.0


def test_size_limit_names_the_low_rank_route(monkeypatch):
    monkeypatch.setattr(dense, "_LAPACK_LIMIT", 10)
    with pytest.raises(SpectrumError, match="low-rank"):
        dense_spectrum(kernel())


@pytest.mark.parametrize(
    "lie",
    [
        lambda s, u: (s, u + 1e-6),
        lambda s, u: (s + 1e-8 * (torch.arange(len(s)) == 25) * s[-1], u),  # one eigenvalue
        lambda s, u: (s, u[:, [*range(20), 21, 20, *range(22, 30)]]),  # two eigenvectors exchanged
    ],
)
def test_a_solver_that_lies_is_caught(lie, monkeypatch):
    true = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: lie(*true(matrix)))
    with pytest.raises(SpectrumError, match="accurate"):
        dense_spectrum(kernel())


def test_effective_dimension_and_condition():
    spectrum = dense_spectrum(torch.diag(torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)))
    np.testing.assert_allclose(spectrum.effective_dimension(1.0), 0.5 + 0.75)
    assert spectrum.condition(1.0) == 4.0 and spectrum.condition() == 3.0
