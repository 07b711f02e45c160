"""The exact kernel: with a projection of the gradients or without, its rounding, its rows as the solver takes them."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from .loo import TrainingFilter
from .losses import ROOTS, Goal
from .spectra import project, projection_matrix

_EXACT = 2.0**-52


def projected_kernel(jac, projection, seed: int, progress: bool):
    """Theta [N, N], with a projection (its matrix, the projected rows), and Theta's ``precision``.

    Errors of single products do not add up: all together they were below 0.3 eps of the largest eigenvalue.
    """
    if projection is None:
        narrow = 4 * torch.finfo(jac.dtype).eps / max(jac.n * jac.k, 1)
        precision = _EXACT if jac.dtype == torch.float64 else narrow
        return jac.gram(progress=progress).to(torch.float64), None, precision
    matrix = projection_matrix(jac, *projection, seed=seed)
    rows = project(jac, matrix).to(torch.float64)
    return rows @ rows.T, (matrix, rows), _EXACT


def projected_cross(probe, jac, features, progress: bool):
    """Theta(validation, train) that goes with ``projected_kernel``."""
    if features is None:
        return probe.gram(jac, progress=progress).to(torch.float64)
    return project(probe, features[0]).to(torch.float64) @ features[1].T


def warn_of_rounding(theta: Tensor, precision: float, phi: TrainingFilter) -> None:
    """Where eigenvalues below the rounding of a kernel matter: the training reaches them, and there may be some."""
    reach = phi.shift if phi.converged else max(phi.shift, 1 / max(phi.eta * phi.time, 1e-300))
    if precision == _EXACT or reach > 10 * len(theta) * precision * float(torch.linalg.matrix_norm(theta, 1)):
        return
    s = torch.linalg.eigvalsh(theta)
    floor = len(theta) * precision * float(s[-1])
    if reach < 10 * floor and int((s < floor).sum()) > int((theta == 0).all(1).sum()):
        warnings.warn(
            "sui_fast: the kernel was not computed in float64, and with so little regularisation directions below its "
            "rounding count: scores may be wrong. Pass dtype=torch.float64, a larger reg, or a shorter time.",
            RuntimeWarning,
            stacklevel=4,
        )


def is_certain(size: Tensor, r0: Tensor, goal: Goal) -> bool:
    """Whether rows of the whitened kernel (diagonal: size) are so small, or residuals so large, that digits go."""
    size = size.reshape(r0.shape).abs()
    lost = (size < 1e-8 * size.max()) & (r0 != 0) & (size > 0)
    if goal.kind in ("cross_entropy", "binary_cross_entropy"):
        lost |= r0.abs() > 1e4
    return goal.kind in ROOTS and bool(lost.any())


def even_rows(cross: Tensor, m: int, rows: int) -> Tensor:
    """The cross kernel as the solver takes it, ``rows`` to a validation sample, with the same mean of squares.

    Training on logits has a row less per sample than there are logits; the solver knows one number for both.
    """
    if len(cross) == m * rows:
        return cross
    fill = -len(cross) % rows
    even = torch.cat([cross, cross.new_zeros(fill, cross.shape[1])])
    return even * math.sqrt(len(even) / (m * rows))
