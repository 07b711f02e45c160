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


def class_margin(outputs: Tensor, labels: Tensor) -> Tensor:
    """How clearly outputs are for the given class; negative: against it.

    ::

        k > 1:  f[label] - max over the other classes
        k = 1:  (2 label - 1) f,  label in {0, 1}

    Args:
        outputs: [n, k]. labels: given class of each sample, int64 [n].
    Returns:
        [n], in units of the outputs.
    """
    if outputs.shape[1] == 1:
        return (2.0 * labels - 1.0) * outputs[:, 0]
    given = outputs.gather(1, labels[:, None])[:, 0]
    return given - outputs.scatter(1, labels[:, None], -torch.inf).amax(1)


def suggested_label(outputs: Tensor, threshold: float) -> Tensor:
    """Class that outputs speak for: the largest, or {0, 1} by the threshold where k = 1.

    Args:
        outputs: [n, k]. threshold: between the two classes, in units of the outputs.
    Returns:
        int64 [n].
    """
    return (outputs[:, 0] > threshold).to(torch.int64) if outputs.shape[1] == 1 else outputs.argmax(1)
