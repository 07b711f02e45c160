"""Removal: what changes when a block of samples is left out, for every block, from one factorisation.

Both forms give D_b = alpha without b - alpha, in the coordinates in which they are cheap:

* ``spectral`` (any training time): coefficients of D_b on the eigenvectors of Theta;
* ``dual`` (converged, well conditioned): D_b = -A_:b v_b with A = (Theta + shift I)^-1.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import converged_removal, rational_removal
from ..spectra import Spectrum
from .blocks import Blocks
from .converged import ridgeless_removal
from .filters import TrainingFilter
from .rational import fit_rational

_CHUNK = 1 << 25  # float64 elements of one intermediate: 256 MB


class Removal:
    """Effect of leaving out each sample (or group) on the linearised model.

    Arrays are NumPy where the inputs were NumPy, else torch tensors on the device of the inputs; float64.

    Attributes:
        weight_sqnorm: ||w without b - w||^2, [n] (one entry per group where groups were given).
        prediction_sqnorm: mean over validation samples of ||f without b - f||^2, summed over outputs, [n].
        prediction_change: f without b - f on the validation samples, [n, m, k]; computed on request.
        dual_change: D_b, the change of the dual weights, [n, N]; computed on request.
        loo_residual: y_i minus the prediction for sample i of the model trained without its block, [n, k].
        leverage: trace of the removed block of the smoother Theta phi(Theta), [n]; sums to the effective dimension.
        residual: targets minus initial outputs, the r0 of all formulas, [n, k].
        labels: what each entry stands for: sample numbers, or the group labels in ascending order.
        diagnostics: dict with form, rank, effective_dimension, condition, error estimates.
    """

    def __init__(self, blocks: Blocks, residual: Tensor, cross: Tensor | None, as_numpy: bool, diagnostics: dict):
        self._blocks, self.residual, self._cross, self._as_numpy = blocks, residual, cross, as_numpy
        self.labels = blocks.labels
        self.diagnostics: dict[str, Any] = diagnostics

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        return f"Removal({len(self)} blocks of {self._blocks.n} samples x {self._blocks.k} outputs, {self.diagnostics})"

    def _out(self, x: Tensor) -> Any:
        return x.detach().cpu().numpy() if self._as_numpy else x

    def _need_cross(self, what: str) -> Tensor:
        if self._cross is None:
            raise AttributeError(f"{what} needs validation samples: pass cross_ntk to leave_one_out.")
        return self._cross

    @cached_property
    def weight_sqnorm(self):
        return self._out(self._weight_sqnorm())

    @cached_property
    def hessian_sqnorm(self):
        """dw^T (J^T J + shift I) dw, [n]: the metric of Langevin noise and of Cook's distance."""
        return self._out(self._hessian_sqnorm())

    @cached_property
    def prediction_sqnorm(self):
        self._need_cross("prediction_sqnorm")
        return self._out(self._prediction_sqnorm())

    @cached_property
    def prediction_change(self):
        self._need_cross("prediction_change")
        change = self._predict(0, len(self))
        return self._out(change.reshape(len(self), -1, self._blocks.k))

    @cached_property
    def dual_change(self):
        return self._out(self._dual_change())

    @cached_property
    def loo_residual(self):
        return self._out(self._loo_residual())

    @cached_property
    def leverage(self):
        return self._out(self._leverage())

    def sum_over_blocks(self, per_sample: Tensor) -> Tensor:
        """Sum of a value per sample [n] over the samples of each removed block."""
        owner = torch.from_numpy(self._blocks.block_of_sample).to(per_sample.device)
        return per_sample.new_zeros(len(self)).index_add_(0, owner, per_sample)

    def _prediction_sqnorm(self) -> Tensor:
        probes = self._cross.shape[0]
        step = max(1, _CHUNK // max(probes, 1))
        parts = [self._predict(b, b + step).square().sum(1) for b in range(0, len(self), step)]
        return torch.cat(parts) * (self._blocks.k / probes)


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
            elif changed.time == 0 or changed.eta == 0:
                self._left_out[rows] = residual.reshape(-1)[rows]
            else:
                fit = fit_rational(changed, spectrum.top)
                fit_error, pole_count = max(fit_error, fit.error), max(pole_count, len(fit.poles))
                self._remove_rational(numbers, rows, changed, fit)
            still = torch.from_numpy(numbers).to(u.device)[idle[rows].all(1)]
            self._change[still] = 0.0  # rows of zeros act on nothing: the value is exact, not a rounding of zero
            if changed != phi and not settled or changed.shift != phi.shift:
                other = _on(s, changed(s.cpu().numpy()))
                self._change[numbers] += (other - self._scale) * self._gain
            if not settled:
                self._left_out[rows] = self._residual_after(numbers, rows)
        self.diagnostics.update(
            form="converged, primal" if settled else "finite time, rational",
            rank=spectrum.rank,
            effective_dimension=float((self._scale * s).sum()),
            condition=spectrum.condition(phi.shift),
            eigen_error=spectrum.error,
            filter_error=fit_error,
            poles=pole_count,
        )

    def _chunks(self, numbers: np.ndarray, rows: Tensor):
        step = max(1, _CHUNK // max(1, rows.shape[1] * self.spectrum.u.shape[1]))
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

    def _remove_rational(self, numbers: np.ndarray, rows: Tensor, changed: TrainingFilter, fit) -> None:
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
        left = self.residual.reshape(-1) - self.spectrum.u @ (self.spectrum.s * self._scale * self._gain)
        return left.reshape(self.residual.shape)


class DualRemoval(Removal):
    """Converged removal from A = (Theta + shift I)^-1; D_b = -A_:b v_b. No spectrum needed."""

    def __init__(
        self,
        ntk: Tensor,
        inverse: Tensor,
        shift: float,
        condition: float,
        blocks: Blocks,
        residual: Tensor,
        cross: Tensor | None,
        as_numpy: bool,
    ):
        super().__init__(blocks, residual, cross, as_numpy, {})
        self._ntk, self._inverse, self._shift = ntk, inverse, shift
        alpha = inverse @ residual.reshape(-1)
        self._left_out = torch.empty_like(alpha)
        for _, rows in self._by_size():
            own = inverse[rows[:, :, None], rows[:, None, :]]
            self._left_out[rows] = torch.linalg.solve(own, alpha[rows])
        n_rows = len(alpha)
        self.diagnostics.update(
            form="converged, dual",
            rank=n_rows,
            effective_dimension=float(n_rows - shift * inverse.diagonal().sum()),
            condition=condition,
            eigen_error=0.0,
            filter_error=0.0,
            poles=1,
        )

    def _by_size(self):
        for numbers in self._blocks.by_size().values():
            yield numbers, self._blocks.rows(numbers, self._inverse.device)

    @cached_property
    def _change(self) -> Tensor:
        """D [n, N], row b = -A_b: v_b."""
        if self._blocks.k == 1 and self._blocks.single:
            return -self._inverse * self._left_out[:, None]
        change = self._inverse.new_empty(len(self), len(self._inverse))
        for numbers, rows in self._by_size():
            step = max(1, _CHUNK // (rows.shape[1] * len(self._inverse)))
            for begin in range(0, len(numbers), step):
                part = rows[begin : begin + step]
                change[numbers[begin : begin + step]] = -torch.einsum(
                    "bm,bmr->br", self._left_out[part], self._inverse[part]
                )
        return change

    @cached_property
    def _norms(self) -> tuple[Tensor, Tensor]:
        """v^T (A - shift A^2)_bb v = ||dw||^2 and v^T (I - shift A)_bb v, digits kept where the leverage is small."""
        change = self._change
        explained = self._inverse.new_empty(len(self))  # v^T A_bb v
        for numbers, rows in self._by_size():
            explained[numbers] = -torch.einsum(
                "bm,bm->b", self._left_out[rows], change[torch.from_numpy(numbers)[:, None], rows]
            )
        total = self.sum_over_blocks(self._left_out.square().reshape(self.residual.shape).sum(1))
        weight = explained - self._shift * change.square().sum(1)
        hessian = total - self._shift * explained
        weak = torch.nonzero((hessian <= 1e-4 * total) | (weight <= 1e-4 * explained)).flatten()
        step = max(1, _CHUNK // max(1, len(self._inverse)))
        for begin in range(0, len(weak), step):
            part = weak[begin : begin + step]
            moved = change[part] @ self._ntk
            weight[part] = (change[part] * moved).sum(1)
            hessian[part] = moved.square().sum(1) + self._shift * weight[part]
        return weight.clamp_min(0.0), hessian.clamp_min(0.0)

    def _weight_sqnorm(self) -> Tensor:
        return self._norms[0]

    def _hessian_sqnorm(self) -> Tensor:
        return self._norms[1]

    def _predict(self, begin: int, end: int) -> Tensor:
        return self._change[begin:end] @ self._cross.T

    def _prediction_sqnorm(self) -> Tensor:
        if self._blocks.k == 1 and self._blocks.single:
            moved = self._cross @ self._inverse
            return moved.square().mean(0) * self._left_out.square()
        return super()._prediction_sqnorm()

    def _dual_change(self) -> Tensor:
        return self._change

    def _loo_residual(self) -> Tensor:
        return self._left_out.reshape(self.residual.shape)

    def _leverage(self) -> Tensor:
        rows = (1 - self._shift * self._inverse.diagonal()).reshape(self.residual.shape).sum(1)
        return self.sum_over_blocks(rows)


def _on(like: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like)


def _pseudo_inverse(s: Tensor) -> Tensor:
    return torch.where(s > 0, 1 / torch.where(s > 0, s, 1.0), 0.0)
