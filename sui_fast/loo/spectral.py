"""Removal in the eigenbasis of Theta, for any training filter."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .._errors import StabilityError, complaint
from ..ops import converged_removal, rational_removal
from ..spectra import Spectrum
from .blocks import Blocks
from .converged import ridgeless_removal
from .filters import TrainingFilter
from .rational import Rational, fit_rational
from .removal import CHUNK, Removal

_REDUCED_WORK = 1e11  # operations that a look at every reduced spectrum may take


class SpectralRemoval(Removal):
    """Removal in the eigenbasis of Theta: any training filter, any groups, any convention."""

    def __init__(
        self,
        spectrum: Spectrum,
        phi: TrainingFilter,
        convention: str,
        blocks: Blocks,
        residual: Tensor,
        cross: Tensor | None,
        as_numpy: bool,
        idle: Tensor,
    ):
        super().__init__(blocks, residual, cross, as_numpy, {})
        self.spectrum, self._phi = spectrum, phi
        u, s = spectrum.u, spectrum.s
        self._reached = s > 0
        self._gain = u.T @ residual.reshape(-1)
        self._left_out = torch.full_like(residual.reshape(-1), float("nan"))
        self._change = u.new_zeros(len(blocks), len(s))
        fit_error, pole_count, settled = 0.0, 0, phi.converged
        self._scale = _on(s, phi(s.cpu().numpy())) if phi.converged is False or phi.shift > 0 else _pseudo_inverse(s)
        for removed, numbers in blocks.by_size().items():
            rows = blocks.rows(numbers, u.device)
            changed = phi.without(removed, blocks.n, convention)
            if removed == blocks.n:
                self._change[numbers] = -self._scale * self._gain
                self._left_out[rows] = residual.reshape(-1)[rows]
                continue
            settled = changed.is_settled(float(s[0]), spectrum.top)
            if settled:
                self._remove_converged(numbers, rows, changed.shift)
            elif changed.time == 0 or changed.eta == 0 or spectrum.top == 0:
                self._left_out[rows] = residual.reshape(-1)[rows]
            else:
                reduced = self._reduced_top(numbers, changed)
                fit = fit_rational(changed, reduced)
                fit_error, pole_count = max(fit_error, fit.error), max(pole_count, len(fit.poles))
                self._remove_rational(numbers, rows, changed, fit)
            still = torch.from_numpy(numbers).to(u.device)[idle[rows].all(1)]
            self._change[still] = 0.0  # rows of zeros act on nothing: the value is exact, not a rounding of zero
            if changed != phi and not settled or changed.shift != phi.shift:
                # above the reduced spectra the filter may diverge: there the fit stands for itself and cancels
                beyond = not settled and fit_error > 0 and reduced < spectrum.top
                other = _on(s, (fit if beyond else changed)(s.cpu().numpy()))
                self._change[numbers] += (other - self._scale) * self._gain
            if not settled:
                self._left_out[rows] = self._residual_after(numbers, rows)
        if fit_error > 1e-6:
            raise StabilityError(
                complaint(
                    "lr",
                    "a training filter that can be resolved",
                    f"one fitted to {fit_error:.1e} only",
                    "Lower lr, which is at the edge of stability, or shorten time.",
                )
            )
        self.diagnostics.update(
            form="converged, primal" if settled else "finite time, rational",
            rank=spectrum.rank,
            effective_dimension=float((self._scale * s).sum()),
            condition=spectrum.condition(phi.shift),
            eigen_error=spectrum.error,
            filter_error=fit_error,
            poles=pole_count,
        )

    def _reduced_top(self, numbers: np.ndarray, changed: TrainingFilter) -> float:
        """Upper bound of the spectra that are left: that of all samples, unless ``changed`` is unstable there."""
        top, limit = self.spectrum.top, 2 / changed.eta - changed.shift
        if changed.dynamics != "gd" or top < limit:
            return top
        size = len(self.spectrum.s)
        if size**3 * len(numbers) > _REDUCED_WORK:
            raise StabilityError(
                complaint(
                    "lr",
                    f"a step below {limit / top:.6g} times its present value",
                    "one at the edge of stability",
                    "With a sample left out the step size grows and may diverge; lower lr a little.",
                )
            )
        theta = (self.spectrum.u * self.spectrum.s) @ self.spectrum.u.T
        largest = 0.0
        for rows in self._blocks.rows(numbers, theta.device):
            keep = torch.ones(size, dtype=torch.bool, device=theta.device)
            keep[rows] = False
            largest = max(largest, float(torch.linalg.eigvalsh(theta[keep][:, keep])[-1]))
        if largest >= limit:
            raise StabilityError(
                complaint(
                    "lr",
                    "a step that is stable with a sample left out",
                    f"{changed.eta / self._phi.eta:.6g} times the step of all samples, which diverges",
                    "Lower lr, or use convention='sum'.",
                )
            )
        return largest * (1 + 1e-12)

    def _chunks(self, numbers: np.ndarray, rows: Tensor):
        step = max(1, CHUNK // max(1, rows.shape[1] * self.spectrum.u.shape[1]))
        for begin in range(0, len(numbers), step):
            part = slice(begin, begin + step)
            yield numbers[part], rows[part]

    def _remove_converged(self, numbers: np.ndarray, rows: Tensor, shift: float) -> None:
        u, s, g = self.spectrum.u, self.spectrum.s, self._gain
        reached, missed = self._reached, ~self._reached
        for part, index in self._chunks(numbers, rows):
            block = u[index]
            if shift > 0:
                rest, null = block.new_zeros(index.shape), block.new_zeros(*index.shape, index.shape[1])
                v, change = converged_removal(block, s, g, rest, null, shift)
                self._change[part] = change
            else:
                beyond = block[..., missed]
                v, change = ridgeless_removal(
                    block[..., reached], s[reached], g[reached], beyond @ g[missed], beyond @ beyond.transpose(1, 2)
                )
                self._change[np.ix_(part, reached.cpu().numpy())] = change
            self._left_out[index] = v

    def _remove_rational(self, numbers: np.ndarray, rows: Tensor, changed: TrainingFilter, fit: Rational) -> None:
        u, s, g = self.spectrum.u, self.spectrum.s, self._gain
        poles, residues = (torch.from_numpy(x).to(u.device) for x in (fit.poles, fit.residues))
        for part, index in self._chunks(numbers, rows):
            block = u[index]
            rest, null = block.new_zeros(index.shape), block.new_zeros(*index.shape, index.shape[1])
            own = self.residual.reshape(-1)[index]
            self._change[part] = rational_removal(block, s, g, rest, null, own, poles, residues, fit.constant)

    def _residual_after(self, numbers: np.ndarray, rows: Tensor) -> Tensor:
        """r0 - Theta (alpha + D_b), removed rows."""
        u, s = self.spectrum.u, self.spectrum.s
        after = torch.empty_like(rows, dtype=u.dtype)
        begin = 0
        for part, index in self._chunks(numbers, rows):
            weights = s * (self._scale * self._gain + self._change[part])
            after[begin : begin + len(part)] = self.residual.reshape(-1)[index] - torch.einsum(
                "bmr,br->bm", u[index], weights
            )
            begin += len(part)
        return after

    @cached_property
    def coordinates(self) -> Tensor:
        """delta_b = diag(s)^(1/2) U^T D_b: the weight change in the row space of J, [n, r]."""
        return self._change[:, self._reached] * self.spectrum.s[self._reached].sqrt()

    def _weight_sqnorm(self) -> Tensor:
        return self._change.square() @ self.spectrum.s

    def _hessian_sqnorm(self) -> Tensor:
        return self._change.square() @ (self.spectrum.s * (self.spectrum.s + self._phi.shift))

    @cached_property
    def _probe(self) -> Tensor:
        return (self._cross @ self.spectrum.u) * self._reached

    def _predict(self, begin: int, end: int) -> Tensor:
        return self._change[begin:end] @ self._probe.T

    def _dual_change(self) -> Tensor:
        return self._change @ self.spectrum.u.T

    def _loo_residual(self) -> Tensor:
        return self._left_out.reshape(self.residual.shape)

    def _leverage(self) -> Tensor:
        rows = (self.spectrum.u.square() @ (self._scale * self.spectrum.s)).reshape(self.residual.shape).sum(1)
        return self.sum_over_blocks(rows)

    def trained_residual(self) -> Tensor:
        """Y - f at the end of the training on all samples, [n, k]."""
        share = _on(self.spectrum.s, self._phi.remaining(self.spectrum.s.cpu().numpy()))
        return (self.spectrum.u @ (share * self._gain)).reshape(self.residual.shape)


def _on(like: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like)


def _pseudo_inverse(s: Tensor) -> Tensor:
    return torch.where(s > 0, 1 / torch.where(s > 0, s, 1.0), 0.0)
