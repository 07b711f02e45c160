"""Unique information under the noise that SGD itself makes in its steady state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import ArgumentError, SpectrumError, complaint
from ..loo import SpectralRemoval
from ..spectra import Moments


@dataclass(frozen=True)
class SgdNoise:
    """Sigma, the steady-state covariance of SGD, as its Cholesky factor with a diagonal of ones.

    Attributes:
        scale: 1 / standard deviation in each direction [r]. factor: lower triangular [r, r].
        added: what the jitter added to the variances [r].
    """

    scale: Tensor
    factor: Tensor
    added: Tensor


def sgd_noise(
    removals: Iterable[SpectralRemoval],
    s: Tensor,
    n: int,
    *,
    shift: float,
    lr: float,
    batch_size: int,
    jitter: float = 1e-9,
    every: Callable[[Tensor], Iterable[Tensor]] | None = None,
) -> SgdNoise:
    """Sigma of all samples, shard by shard.

    ::

        H Sigma + Sigma H = (lr / batch_size) (L + jitter tr(L) / r I),    H = J^T J + shift I
        L = 1/n sum_i (q_i - q)(q_i - q)^T,   q_i = -J_i^T (y_i - f(x_i)) at the trained weights

    In the eigenbasis of H (coordinates diag(s)^(-1/2) U^T J) the Lyapunov equation is one division,
    Sigma_ab = (lr / batch_size) L_ab / (h_a + h_b), h = s + shift. Only the row space of J takes part.

    Args:
        removals: from the spectrum, of one shard after the other. s: its eigenvalues. n: samples in all.
        shift: lambda of the summed loss.
        lr: step size of SGD; batch_size: samples per step.
        jitter: share of the mean variance added to every direction, so that Sigma can be inverted.
        every: gives what each of several processes has of a tensor, in their order.
    Raises:
        ArgumentError: the gradients of all samples agree (an interpolating model), so SGD makes no noise.
        SpectrumError: the jitter is too small.
    Source: Harutyunyan et al., ICLR 2021, Proposition 5.1, eqs. 13 and 14; Mandt et al. 2017 for the steady state.
    """
    s = s[s > 0]
    sums, most = Moments(len(s), s.device), torch.zeros(1, 2, dtype=torch.float64, device=s.device)
    for removal in removals:
        left = removal.trained_residual()
        features = (removal.spectrum.u[:, removal.spectrum.s > 0] * s.sqrt()).reshape(*left.shape, -1)
        gradients = -torch.einsum("nkr,nk->nr", features, left) - removal.trained_pull() / n  # nearly their mean
        sums.add(gradients[:, None], gradients.new_ones(len(left), 1))
        most = torch.maximum(most, torch.stack([left.abs().max(), removal.residual.abs().max()]))
    if every is not None:
        sums.reduce(every)
        most = torch.cat(list(every(most)))
    mean = sums.pull / n
    noise = sums.gram / n - mean[:, None] * mean
    size, (left, initial) = float(noise.trace()) / max(len(s), 1), most.amax(0)
    if size == 0.0 or float(left) <= 1e-12 * float(initial):
        raise ArgumentError(
            complaint(
                "measures",
                "per-sample gradients that vary at the trained weights for 'si_sgd'",
                "gradients that all agree (the model interpolates its targets)",
                "Use reg > 0 or a finite time, or the measure 'si'.",
            )
        )
    h, rate = s + shift, lr / batch_size
    added = rate * jitter * size / (2 * h)
    covariance = noise * (rate / (h[:, None] + h[None, :]))
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
    return SgdNoise(scale, factor, added)


def sgd_information(removal: SpectralRemoval, noise: SgdNoise) -> tuple[Tensor, Tensor]:
    """1/2 dw^T Sigma^-1 dw, for any number of parameters.

    Args:
        removal: from the spectrum of the noise.
    Returns:
        information [n] in nats (without the 1 / sigma^2 of the caller) and the share of it [n], in [0, 1], that rests
        on the jitter: 1 where the change leaves the range of L.
    """
    delta = removal.coordinates
    solved = noise.scale[:, None] * torch.cholesky_solve(noise.scale[:, None] * delta.T, noise.factor)
    value = (delta.T * solved).sum(0)
    share = (solved.square() * noise.added[:, None]).sum(0) / torch.where(value > 0, value, 1.0)
    return value / 2, share.clamp(0.0, 1.0)
