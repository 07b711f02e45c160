"""Choosing the regularisation: the exact leave-one-out error, or that of training on a part, over a grid."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._errors import StabilityError
from ..spectra import Spectrum
from .blocks import Blocks
from .solve import check_stability, make_filter, remove_from_spectrum

_PAIRS = 1 << 21  # float64 products of eigenvectors at a time


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
    grid, regs, errors = scale * np.logspace(-9, 1, points), [], []
    if time is None and spectrum.complete and blocks.single and blocks.n > 1:
        shifts = [make_filter(blocks.n, reg=float(reg)).without(1, blocks.n, convention).shift for reg in grid]
        left_out = _converged_left_out(spectrum, r0, torch.tensor(shifts, dtype=r0.dtype, device=r0.device))
        return grid, np.array([float(error(slice(None), v).mean()) for v in left_out])
    for reg in grid:
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


def _converged_left_out(spectrum: Spectrum, r0: Tensor, shifts: Tensor) -> Tensor:
    """Left-out residuals [p, n, k] of ridge regression with every shift [p], from one pass over the eigenvectors.

    ::

        v_i = (u_i diag(1 / (s + shift)) u_i^T)^-1 u_i diag(1 / (s + shift)) u^T r0       (``ops.converged_removal``)
    """
    (n, k), s = r0.shape, spectrum.s
    u, gain = spectrum.u.view(n, k, len(s)), spectrum.u.T @ r0.reshape(-1)
    weights = 1 / (s[:, None] + shifts)  # [r, p]
    left_out = r0.new_empty(len(shifts), n, k)
    step = max(1, _PAIRS // (k * k * len(s)))
    for begin in range(0, n, step):
        rows = u[begin : begin + step]
        kernel = ((rows[:, :, None] * rows[:, None]).reshape(-1, len(s)) @ weights).view(-1, k, k, len(shifts))
        right = ((rows * gain).reshape(-1, len(s)) @ weights).view(-1, k, len(shifts))
        if k == 1:
            left_out[:, begin : begin + step] = (right / kernel[:, 0]).permute(2, 0, 1)
        else:
            left_out[:, begin : begin + step] = torch.linalg.solve(kernel.permute(3, 0, 1, 2), right.permute(2, 0, 1))
    return left_out


def part_error_curve(
    learn: Callable[[np.ndarray, np.ndarray], tuple[Tensor, Tensor, Tensor]],
    r0: Tensor,
    m: int,
    *,
    time: float | None,
    lr: float | None,
    dynamics: str,
    repeats: int = 5,
    seed: int = 0,
    points: int = 31,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared error on the others of training on m random samples, for regularisations as in ``loo_error_curve``.

    Args:
        learn: (numbers of samples, numbers of the others) -> spectrum s of the kernel of the samples, ascending [q],
            u^T r0 [q], and Theta(others, samples) u [others k, q].
        r0: residual at the initial weights [n, k]. m: samples of a part, below n.
        repeats: parts drawn; seed: of the draw; points: size of the logarithmic grid. time, lr, dynamics: as above.
    Returns:
        regs [p] (of the mean loss of m samples, those for which the training is stable) and errors [p].
    """
    n = len(r0)
    rng = np.random.default_rng(seed)
    regs, errors = np.zeros(0), np.zeros(points)
    for _ in range(repeats):
        order = rng.permutation(n)
        s, gain, cross = learn(order[:m], order[m:])
        rest, top = r0[torch.from_numpy(order[m:]).to(r0.device)].reshape(-1), float(s[-1])
        if not len(regs):
            regs = (top / m if top > 0 else 1.0) * np.logspace(-9, 1, points)
        for place, reg in enumerate(regs):
            phi = make_filter(m, reg=float(reg), time=time, lr=lr, dynamics=dynamics)
            try:
                check_stability(phi, top, m)
            except StabilityError:
                if not place:
                    raise
                regs = regs[:place]
                break
            scale = torch.from_numpy(phi(s.cpu().numpy())).to(gain)
            left = rest - cross @ torch.where(s > 0, scale * gain, 0.0)
            errors[place] += float(left.square().sum()) / ((n - m) * repeats)
    return regs, errors[: len(regs)]
