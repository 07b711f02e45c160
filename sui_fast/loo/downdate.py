"""Removing samples for good, step by step: the inverse kernel is down-dated, not computed again.

With A = (Theta + lambda I)^-1 and rows R dropped, the inverse of what is kept is a Schur complement,

    A_kept = A_KK - A_KR A_RR^-1 A_RK         O(N^2 |R|) instead of O(N^3)

and every measure of the kept samples follows from it as from a fresh one (``dual.py``).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._errors import ArgumentError, complaint
from ..spectra import dense_spectrum
from .blocks import make_blocks
from .dual import DualRemoval
from .removal import Removal
from .solve import CHOLESKY_ROUNDING, cholesky_inverse, make_filter, remove_from_spectrum, sound

_DRIFT = 1e-11  # relative residual of the down-dated inverse above which it is factored anew


class Remaining:
    """A training set that shrinks, and the removal of each sample that is still in it.

    Attributes:
        kept: numbers of the samples that are left, ascending int64.
        factorisations: how often a kernel was factored or diagonalised; down-dates are not counted.
    """

    def __init__(
        self,
        theta: Tensor,
        r0: Tensor,
        *,
        reg: float = 0.0,
        time: float | None = None,
        lr: float | None = None,
        dynamics: str = "gd",
        convention: str = "sum",
        cross: Tensor | None = None,
    ):
        """Arguments as in ``leave_one_out``; tensors in float64: theta [N, N], r0 [n, k], cross [m k, N].

        ``reg`` and ``lr`` are those of the mean loss over all n samples; as samples go, the summed loss keeps its
        lambda and eta, or changes them by ``convention``.
        """
        self._n, self._k = r0.shape
        self._theta, self._r0, self._cross, self._convention = theta, r0, cross, convention
        self._training = dict(reg=reg, time=time, lr=lr, dynamics=dynamics)
        self._base = self._n
        self._whole = make_filter(self._n, **self._training)
        self.kept = np.arange(self._n)
        self.factorisations = 0
        self._inverse: Tensor | None = None
        self._norm = float(torch.linalg.matrix_norm(theta, 1))

    @property
    def _phi(self):
        return self._whole.without(self._base - len(self.kept), self._base, self._convention)

    def rescale(self) -> None:
        """From here on lambda and eta are those of the mean loss over the samples now left; one factorisation."""
        self._base = len(self.kept)
        self._whole = make_filter(self._base, **self._training)
        self._inverse = None

    def _rows(self, samples: np.ndarray) -> Tensor:
        rows = (samples[:, None] * self._k + np.arange(self._k)).ravel()
        return torch.from_numpy(rows).to(self._theta.device)

    def drop(self, samples) -> None:
        """Take samples (by number) out of the training set."""
        gone = np.unique(np.asarray(samples, dtype=np.int64))
        inside = np.isin(self.kept, gone)
        if inside.sum() != len(gone):
            got = f"{int(gone[~np.isin(gone, self.kept)][0])}, which is not"
            todo = "Drop each sample once."
            raise ArgumentError(complaint("samples", "samples still in the training set", got, todo))
        if self._inverse is not None:
            local = np.repeat(inside, self._k)
            out, keep = (torch.from_numpy(np.flatnonzero(x)).to(self._theta.device) for x in (local, ~local))
            a = self._inverse
            mixed = a[keep][:, out]
            factor, info = torch.linalg.cholesky_ex(a[out][:, out])
            if int(info) == 0:
                half = torch.linalg.solve_triangular(factor, mixed.T, upper=False)
                self._inverse = a[keep][:, keep].addmm_(half.T, half, alpha=-1)
            else:
                self._inverse = None
        self.kept = self.kept[~inside]

    def removal(self) -> Removal:
        """Effect of leaving out each kept sample, in the order of ``kept``."""
        if len(self.kept) == 0:
            raise ArgumentError(complaint("samples", "at least one sample left", "none", "Drop fewer samples."))
        rows = self._rows(self.kept)
        whole = len(self.kept) == self._n
        theta = self._theta if whole else self._theta[rows][:, rows]
        cross = self._cross if whole or self._cross is None else self._cross[:, rows]
        r0 = self._r0[torch.from_numpy(self.kept).to(self._r0.device)]
        blocks, idle = make_blocks(len(self.kept), self._k), (theta == 0).all(1)
        phi = self._phi
        if phi.converged and phi.shift > 0 and len(blocks) > 1 and self._convention != "mean":
            of = lambda condition: DualRemoval(self._inverse, phi.shift, condition, blocks, r0, cross, False, idle)  # noqa: E731
            if self._inverse is not None and not self._drifted(theta, phi.shift):
                condition = (self._norm + phi.shift) * float(torch.linalg.matrix_norm(self._inverse, 1))
                removal = of(condition)
                if removal.rounding <= CHOLESKY_ROUNDING:
                    return removal
                del removal
            self._inverse = None
            found = cholesky_inverse(theta, phi.shift)
            self.factorisations += 1
            if found is not None:
                self._inverse, condition = found
                removal = of(condition)
                if sound(removal, theta, phi.shift, condition):  # rows tell more of a factor just made
                    return removal
                del removal
        self.factorisations += 1
        return remove_from_spectrum(
            dense_spectrum(theta), phi, r0, cross=cross, blocks=blocks, convention=self._convention, as_numpy=False,
            idle=idle,
        )  # fmt: skip

    def sqnorm(self, seen: bool) -> Tensor:
        """||dw||^2, or with ``seen`` the mean ||df||^2, of leaving out each kept sample."""
        removal = self.removal()
        return removal.prediction_sqnorm if seen else removal.weight_sqnorm

    def _drifted(self, theta: Tensor, shift: float) -> bool:
        """Whether (theta + shift) A differs from 1 on a few fixed vectors by more than rounding may."""
        size = len(theta)
        periods = torch.tensor([1, 3, 7], device=theta.device)
        signs = 1.0 - 2.0 * (torch.arange(size, device=theta.device)[:, None] // periods % 2).to(theta.dtype)
        solved = self._inverse @ signs
        rest = theta @ solved + shift * solved - signs
        return not float(rest.norm() / signs.norm()) <= _DRIFT * max(1.0, self._norm / shift * 1e-4)
