"""Smooth unique information with isotropic or Langevin noise, and the margin of the left-out prediction."""

from __future__ import annotations

import torch
from torch import Tensor

UNITS = {
    "si": "nats",
    "fsi": "nats",
    "si_langevin": "nats",
    "si_sgd": "nats",
    "leverage": "outputs",
    "loo_residual": "units of the targets",
    "loo_margin": "units of the targets",
}
MEASURES = tuple(UNITS)


def information(sqnorm: Tensor, sigma: float) -> Tensor:
    """Kullback-Leibler divergence of two Gaussians whose means differ by the removal, in nats.

    ::

        SI   = ||dw||^2 / (2 sigma^2)                        noise of the weights
        F-SI = mean_x ||df(x)||^2 / (2 sigma^2)              noise of the predictions
        SI with Langevin noise = dw^T (J^T J + lambda I) dw / (2 sigma^2)

    Args:
        sqnorm: squared norm of the change, any shape.
        sigma: standard deviation of the noise, > 0.
    Returns:
        Information in nats, same shape.
    Source: Harutyunyan et al., ICLR 2021, eqs. 5 (SI), 8 and 16 (F-SI), 15 (Langevin); docs/math.md, section 7.
    """
    return sqnorm / (2.0 * sigma**2)


def loo_margin(targets: Tensor, loo_residual: Tensor, labels: Tensor) -> Tensor:
    """How clearly the model trained without a sample predicts its given label; negative: it disagrees.

    ::

        k > 1:  f_-i(x_i)[label] - max over the other classes
        k = 1:  (2 label - 1) (2 f_-i(x_i) - 1),  label in {0, 1}

    Args:
        targets: [n, k] as regressed on.
        loo_residual: targets minus the left-out prediction, [n, k].
        labels: given class of each sample, int64 [n].
    Returns:
        float64 [n], in units of the targets.
    """
    left_out = targets - loo_residual
    if left_out.shape[1] == 1:
        return (2.0 * labels - 1.0) * (2.0 * left_out[:, 0] - 1.0)
    given = left_out.gather(1, labels[:, None])[:, 0]
    others = left_out.scatter(1, labels[:, None], -torch.inf)
    return given - others.amax(1)


def suggested_label(targets: Tensor, loo_residual: Tensor) -> Tensor:
    """Class that the model trained without a sample gives it: the largest output, or {0, 1} by 1/2 where k = 1.

    Args:
        targets, loo_residual: as in ``loo_margin``.
    Returns:
        int64 [n].
    """
    left_out = targets - loo_residual
    return (left_out[:, 0] > 0.5).to(torch.int64) if left_out.shape[1] == 1 else left_out.argmax(1)
