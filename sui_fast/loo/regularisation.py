"""Choosing the regularisation: the exact leave-one-out error over a grid, from one spectrum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._errors import StabilityError
from ..spectra import Spectrum
from .blocks import Blocks
from .solve import make_filter, remove_from_spectrum


def loo_error_curve(
    spectrum: Spectrum,
    r0: Tensor,
    blocks: Blocks,
    idle: Tensor,
    *,
    time: float | None,
    lr: float | None,
    dynamics: str,
    convention: str,
    error: Callable[[slice, Tensor], Tensor] = lambda part, v: v.square().sum(1),
    points: int = 31,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over samples of the left-out error for regularisations from 1e-9 to 10 times the largest curvature.

    Args:
        spectrum: exact spectrum of the training kernel.
        r0: residual at the initial weights [n, k].
        error: of the left-out residuals v [n, k], per sample; default ||v||^2.
        blocks, idle, time, lr, dynamics, convention: as in ``remove_from_spectrum``.
        points: size of the logarithmic grid.
    Returns:
        regs [p] (of the mean loss, those for which the training is stable) and errors [p].
    """
    scale = spectrum.top / blocks.n if spectrum.top > 0 else 1.0
    regs, errors = [], []
    for reg in scale * np.logspace(-9, 1, points):
        phi = make_filter(blocks.n, reg=float(reg), time=time, lr=lr, dynamics=dynamics)
        try:
            removal = remove_from_spectrum(
                spectrum, phi, r0, cross=None, blocks=blocks, convention=convention, as_numpy=False, idle=idle
            )
        except StabilityError:
            if not regs:
                raise
            break
        regs.append(float(reg))
        errors.append(float(error(slice(None), torch.as_tensor(removal.loo_residual)).mean()))
    return np.array(regs), np.array(errors)
