"""Unique information under the noise that SGD itself makes in its steady state."""

from __future__ import annotations

import torch
from torch import Tensor

from .._errors import ArgumentError, SpectrumError, complaint
from ..loo import SpectralRemoval


def sgd_information(
    removal: SpectralRemoval, *, shift: float, lr: float, batch_size: int, jitter: float = 1e-9
) -> tuple[Tensor, Tensor]:
    """1/2 dw^T Sigma^-1 dw with Sigma the steady-state covariance of SGD, for any number of parameters.

    ::

        H Sigma + Sigma H = (lr / batch_size) (L + jitter tr(L) / r I),    H = J^T J + shift I
        L = 1/n sum_i (q_i - q)(q_i - q)^T,   q_i = -J_i^T (y_i - f(x_i)) at the trained weights

    In the eigenbasis of H (coordinates diag(s)^(-1/2) U^T J) the Lyapunov equation is one division,
    Sigma_ab = (lr / batch_size) L_ab / (h_a + h_b), h = s + shift. Only the row space of J takes part.

    Args:
        removal: from a spectrum.
        shift: lambda of the summed loss.
        lr: step size of SGD; batch_size: samples per step.
        jitter: share of the mean variance added to every direction, so that Sigma can be inverted.
    Returns:
        information [n] in nats (without the 1 / sigma^2 of the caller) and the share of it [n], in [0, 1], that rests
        on the jitter: 1 where the change leaves the range of L.
    Raises:
        ArgumentError: the gradients of all samples agree (an interpolating model), so SGD makes no noise.
    Source: Harutyunyan et al., ICLR 2021, Proposition 5.1, eqs. 13 and 14; Mandt et al. 2017 for the steady state.
    """
    spectrum = removal.spectrum
    reached = spectrum.s > 0
    s, u = spectrum.s[reached], spectrum.u[:, reached]
    left = removal.trained_residual()
    n, k = left.shape
    features = (u * s.sqrt()).reshape(n, k, -1)
    gradients = -torch.einsum("nkr,nk->nr", features, left)
    gradients = gradients - gradients.mean(0)
    noise = gradients.T @ gradients / n
    size = float(noise.trace()) / max(len(s), 1)
    if size == 0.0 or float(left.abs().max()) <= 1e-12 * float(removal.residual.abs().max()):
        raise ArgumentError(
            complaint(
                "measures",
                "per-sample gradients that vary at the trained weights for 'si_sgd'",
                "gradients that all agree (the model interpolates its targets)",
                "Use reg > 0 or a finite time, or the measure 'si'.",
            )
        )
    h = s + shift
    rate = lr / batch_size
    lyapunov = rate / (h[:, None] + h[None, :])
    added = rate * jitter * size / (2 * h)
    covariance = noise * lyapunov
    covariance.diagonal().add_(added)
    scale = covariance.diagonal().rsqrt()
    factor, info = torch.linalg.cholesky_ex(scale[:, None] * covariance * scale)
    if int(info) != 0:
        raise SpectrumError(
            complaint(
                "sgd_jitter",
                "a jitter that makes the covariance of SGD invertible",
                jitter,
                "Raise sgd_jitter, for example to 1e-6.",
            )
        )
    delta = removal.coordinates
    solved = scale[:, None] * torch.cholesky_solve(scale[:, None] * delta.T, factor)
    value = (delta.T * solved).sum(0)
    share = (solved.square() * added[:, None]).sum(0) / torch.where(value > 0, value, 1.0)
    return value / 2, share.clamp(0.0, 1.0)
