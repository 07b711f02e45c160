"""Removal in the eigenbasis of Theta, for any training filter."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .._errors import StabilityError, complaint
from ..ops import converged_removal, rational_removal, rational_sums, triangular_sqnorm
from ..ops.removal import missed_by
from ..spectra import Spectrum
from .blocks import Blocks
from .converged import ridgeless_removal
from .filters import TrainingFilter
from .rational import Rational, fit_rational
from .removal import CHUNK, Removal

_PIECE = 1 << 16  # float64 elements of a product of two rows
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
        *,
        gain: Tensor | None = None,
        moment: Tensor | None = None,
    ):
        """As in ``remove_from_spectrum``. For a shard of the samples: gain: u^T r0 over all of them [r]; moment: an
        upper triangular C [p, r], ||C c||^2 the mean squared change of the predictions by a change c on the
        eigenvectors."""
        super().__init__(blocks, residual, cross, as_numpy, {})
        self.spectrum, self._phi, self._moment = spectrum, phi, moment
        u, s = spectrum.u, spectrum.s
        self._reached = s > 0
        self._gain = u.T @ residual.reshape(-1) if gain is None else gain
        self._missed = self.missed_leverage = u.new_zeros(())
        self._unseen: Tensor | None = None
        self._left_out = torch.full_like(residual.reshape(-1), float("nan"))
        self._held = u.new_empty(0, len(s))
        # where the sums over the changes are known without them (no closures: cycles would keep the rows alive):
        self._row: tuple[Tensor, Tensor] | None = None  # (v, w): the change of sample i is -v_i (w u_i)
        self._light: tuple[Tensor, Rational, Tensor] | None = None  # (rows, fit, base)
        self._sqnorm: Tensor | None = None
        self._form: Tensor | None = None
        light = gain is not None and blocks.single and u.device.type == "cpu"
        fit_error, pole_count, settled = 0.0, 0, phi.converged
        self._scale = _on(s, phi(s.cpu().numpy())) if phi.converged is False or phi.shift > 0 else _pseudo_inverse(s)
        for removed, numbers in blocks.by_size().items():
            rows = blocks.rows(numbers, u.device)
            changed = phi.without(removed, blocks.n, convention)
            if removed == blocks.n:
                self._put(numbers, (-self._scale * self._gain).expand(len(numbers), -1).clone())
                self._left_out[rows] = residual.reshape(-1)[rows]
                continue
            settled = changed.is_settled(float(s[0]), spectrum.top)
            if settled and light and blocks.k == 1 and changed.shift > 0:
                self._remove_lightly(rows, changed, fit_rational(changed, spectrum.top), changed)
                continue
            if settled and blocks.single and blocks.k == 1 and changed.shift == phi.shift > 0:
                self._remove_rows(phi.shift, idle)
                continue
            if settled:
                self._remove_converged(numbers, rows, changed.shift)
            elif changed.time == 0 or changed.eta == 0 or spectrum.top == 0:
                self._left_out[rows] = residual.reshape(-1)[rows]
                self._put(numbers, u.new_zeros(len(numbers), len(s)))
            else:
                reduced = self._reduced_top(numbers, changed)
                fit = fit_rational(changed, reduced)
                fit_error, pole_count = max(fit_error, fit.error), max(pole_count, len(fit.poles))
                if light and len(numbers) == len(self):
                    self._remove_lightly(rows, changed, fit, fit if reduced < spectrum.top else changed)
                    continue
                self._remove_rational(numbers, rows, fit)
            still = torch.from_numpy(numbers).to(u.device)[idle[rows].all(1)]
            if len(still):
                self._held[still] = 0.0  # rows of zeros act on nothing: the value is exact, not a rounding of zero
            if changed != phi and not settled or changed.shift != phi.shift:
                # above the reduced spectra the filter may diverge: there the fit stands for itself and cancels
                beyond = not settled and fit_error > 0 and reduced < spectrum.top
                other = _on(s, (fit if beyond else changed)(s.cpu().numpy()))
                self._held[numbers] += (other - self._scale) * self._gain
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
        if not self.spectrum.complete or size**3 * len(numbers) > _REDUCED_WORK:
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
        """(blocks, their rows, their eigenvectors [b, m, r]) portion by portion; slices for single samples."""
        u = self.spectrum.u
        step = max(1, CHUNK // max(1, rows.shape[1] * u.shape[1]))
        for begin in range(0, len(numbers), step):
            part = slice(begin, min(begin + step, len(numbers)))
            if self._blocks.single:
                flat = slice(part.start * self._blocks.k, part.stop * self._blocks.k)
                yield part, rows[part], u[flat].view(-1, self._blocks.k, u.shape[1])
            else:
                yield numbers[part], rows[part], u[rows[part]]

    def _outside(self, block: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the eigenvectors miss of the removed residual [b, m], and the removed block of 1 - u u^T [b, m, m]."""
        return missed_by(block, self._gain, self.residual.reshape(-1)[index], not self.spectrum.complete)

    def _remove_rows(self, shift: float, idle: Tensor) -> None:
        """``converged_removal`` of single rows: all that is asked of them are sums over u and its squares."""
        s, g, w = self.spectrum.s, self._gain, 1 / (self.spectrum.s + shift)
        v, squares = self._left_out, torch.empty_like(self._left_out)
        forms, lines = torch.stack([w, torch.ones_like(w), s * w.square()]), torch.stack([w * g, g])
        step = max(1, CHUNK // max(1, len(s)))
        for part in (slice(begin, begin + step) for begin in range(0, len(self), step)):
            u, own = self.spectrum.u[part], self.residual.reshape(-1)[part]
            kernel, norm, squares[part] = _dots(u, u, forms.T).unbind(1)
            pull, reached = (u @ lines.T).unbind(1)
            if self.spectrum.complete:
                v[part] = pull / kernel
            else:
                v[part] = (pull + (own - reached) / shift) / (kernel + (1 - norm) / shift)
        change = torch.where(idle, 0.0, v)
        self._sqnorm, self._row = change.square() * squares, (change, w)

    @property
    def _change(self) -> Tensor:
        if self._row is not None and len(self._held) == 0:
            v, w = self._row
            self._held = (self.spectrum.u * w).mul_(-v[:, None])
        if self._light is not None and len(self._held) == 0:
            rows, fit, base = self._light
            self._remove_rational(np.arange(len(self)), rows, fit)
            self._held += base
        return self._held

    def _remove_converged(self, numbers: np.ndarray, rows: Tensor, shift: float) -> None:
        s, g = self.spectrum.s, self._gain
        reached, missed = self._reached, ~self._reached
        for part, index, block in self._chunks(numbers, rows):
            rest, null = self._outside(block, index)
            if shift > 0:
                v, change = converged_removal(block, s, g, rest, null, shift)
                self._put(part, change)
            else:
                beyond = block[..., missed]
                rest, null = rest + beyond @ g[missed], null + beyond @ beyond.transpose(1, 2)
                v, change = ridgeless_removal(block[..., reached], s[reached], g[reached], rest, null)
                full = change.new_zeros(len(change), len(s))
                full[:, reached] = change
                self._put(part, full)
            self._left_out[index] = v

    def _put(self, part, change: Tensor) -> None:
        if len(change) == len(self):
            self._held = change  # everything at once: no copy
            return
        if len(self._held) == 0:
            self._held = change.new_empty(len(self), change.shape[1])
        self._held[part] = change

    def _rational_parts(self, numbers: np.ndarray, rows: Tensor, fit: Rational):
        """(blocks, arguments of ``rational_removal``) portion by portion."""
        s = self.spectrum.s
        poles, residues = _poles(fit, s)
        for part, index, block in self._chunks(numbers, rows):
            own = self.residual.reshape(-1)[index]
            yield part, (block, s, self._gain, *self._outside(block, index), own, poles, residues, fit.constant)

    def _remove_rational(self, numbers: np.ndarray, rows: Tensor, fit: Rational) -> None:
        for part, arguments in self._rational_parts(numbers, rows, fit):
            self._put(part, rational_removal(*arguments))

    def _remove_lightly(self, rows: Tensor, changed: TrainingFilter, fit: Rational, beyond) -> None:
        """``_remove_rational`` of every sample, of whose change only sums are asked as a rule."""
        s, g = self.spectrum.s, self._gain
        base = (_on(s, beyond(s.cpu().numpy())) - self._scale) * g if changed != self._phi else torch.zeros_like(g)
        factor = g.new_zeros(0, len(g)) if self._moment is None else self._moment
        u, filter_ = self.spectrum.u.view(*self.residual.shape, len(s)), (*_poles(fit, s), fit.constant)
        reached, self._sqnorm, self._form = rational_sums(
            u, s, g, self.residual, not self.spectrum.complete, *filter_, base, self._scale * g, factor
        )
        self._left_out, self._light = (self.residual - reached).reshape(-1), (rows, fit, base)

    def _residual_after(self, numbers: np.ndarray, rows: Tensor) -> Tensor:
        """r0 - Theta (alpha + D_b), removed rows."""
        s, after = self.spectrum.s, []
        fitted = self.spectrum.u @ (s * self._scale * self._gain)
        for part, index, block in self._chunks(numbers, rows):
            change = self._held[part]
            if block.shape[1] == 1:
                change = _dots(block[:, 0], change, s[:, None])
            else:
                change = torch.einsum("bmr,br->bm", block, change * s)
            after.append(self.residual.reshape(-1)[index] - fitted[index] - change)
        return torch.cat(after)

    def add_missed(self, missed: Tensor) -> None:
        """Count what a kernel of low rank leaves out of ||dw||^2.

        Outside the kept eigenvectors removal takes away the sample's own dual weights and, to first order, nothing
        else: ||dw_i||^2 gains alpha_i^T missed_i alpha_i. Where this takes away more than half
        (rows of a sketch that are too long), half of what scaling by the true length gives is kept.

        Args:
            missed: Theta_ii minus its low-rank form, [n, k, k]; what samples of a group share of it is not known.
        """
        weights = self.spectrum.u @ (self._scale * self._gain)
        beyond = float(self._phi(np.zeros(1))[0])
        if np.isfinite(beyond):
            weights = weights + beyond * (self.residual.reshape(-1) - self.spectrum.u @ self._gain)
        weights = weights.reshape(self.residual.shape)
        self._missed = self.sum_over_blocks(torch.einsum("nk,nkl,nl->n", weights, missed, weights))
        self._weights = weights
        self.missed_leverage = missed.diagonal(dim1=1, dim2=2).sum(1) * (beyond if np.isfinite(beyond) else 0.0)
        self._unseen = missed if np.isfinite(beyond) and beyond > 0 else None

    @cached_property
    def coordinates(self) -> Tensor:
        """delta_b = diag(s)^(1/2) U^T D_b: the weight change in the row space of J, [n, r]."""
        return self._change[:, self._reached] * self.spectrum.s[self._reached].sqrt()

    def _weight_sqnorm(self) -> Tensor:
        found = self._sqnorm
        if found is None:
            found = _dots(self._held, self._held, self.spectrum.s[:, None])[:, 0]
        found = found.clamp_min(0)
        total = found + self._missed
        over = total < found / 2  # rows of a sketch may be far longer than what they stand for
        if over.any():
            some = over[torch.from_numpy(self._blocks.block_of_sample).to(over.device)]
            rows, own = self.spectrum.u.view(*self._weights.shape, -1)[some], found.new_zeros(len(some))
            own[some] = torch.einsum("nkr,nk->nr", rows, self._weights[some]).square() @ self.spectrum.s
            share = self._missed[over] / self.sum_over_blocks(own)[over]
            total[over] = torch.maximum(total[over], found[over] / 2 * (1 + share).clamp_min(0))
        return total

    def _hessian_sqnorm(self) -> Tensor:
        metric = self.spectrum.s * (self.spectrum.s + self._phi.shift)
        return _dots(self._change, self._change, metric[:, None])[:, 0]

    @cached_property
    def _probe(self) -> Tensor:
        return (self._cross @ self.spectrum.u) * self._reached

    def _need_cross(self, what: str) -> Tensor | None:
        return self._cross if self._moment is not None and what == "prediction_sqnorm" else super()._need_cross(what)

    def _prediction_sqnorm(self) -> Tensor:
        if self._moment is None:
            return super()._prediction_sqnorm()
        if self._row is not None:
            v, w = self._row
            return _form(self._moment * w, self.spectrum.u) * v.square()
        return _form(self._moment, self._held) if self._form is None else self._form

    def _predict(self, begin: int, end: int) -> Tensor:
        change = self._change[begin:end]
        if len(self) < len(self._cross):  # through the samples: fewer products than the probe of every eigenvector
            return ((change * self._reached) @ self.spectrum.u.T) @ self._cross.T
        return change @ self._probe.T

    def _dual_change(self) -> Tensor:
        return self._change @ self.spectrum.u.T

    def _loo_residual(self) -> Tensor:
        return self._left_out.reshape(self.residual.shape)

    def _leverage(self) -> Tensor:
        weight = (self._scale * self.spectrum.s)[:, None]
        rows = _dots(self.spectrum.u, self.spectrum.u, weight).reshape(self.residual.shape).sum(1)
        return self.sum_over_blocks(rows if self._unseen is None else self._leverage_beyond(rows))

    def _leverage_beyond(self, found: Tensor) -> Tensor:
        """The leverage h with what features miss: h + (1 - h) s phi(s) for positive eigenvalues s of that, as if each
        were a direction of the sample's own; rows that are too long by c^-1/2 have c h / (1 - h + c h).
        """
        u, k, missed = self.spectrum.u, self.residual.shape[1], self._unseen
        s = (missed[:, 0] if k == 1 else torch.linalg.eigvalsh(missed)).clamp_max(self.spectrum.top)
        length = _dots(u, u, self.spectrum.s[:, None]).reshape(self.residual.shape).sum(1)
        c, h = (1 + s.clamp_max(0).sum(1) / length.clamp_min(1e-300)).clamp(0, 1), found / k
        h = torch.where(h < 1, c * h / (1 - h + c * h).clamp_min(1e-300), h)
        s = s.clamp_min(0)
        return k * h + (1 - h).clamp_min(0) * (s * _on(s, self._phi(s.cpu().numpy()))).sum(1)

    def trained_residual(self) -> Tensor:
        """Y - f at the end of the training on all samples, [n, k]."""
        share = _on(self.spectrum.s, self._phi.remaining(self.spectrum.s.cpu().numpy()))
        if self.spectrum.complete:
            return (self.spectrum.u @ (share * self._gain)).reshape(self.residual.shape)
        return self.residual - (self.spectrum.u @ ((1 - share) * self._gain)).reshape(self.residual.shape)

    def trained_pull(self) -> Tensor:
        """-J^T (Y - f) over all samples at the end of the training, in the row space of J, [r]."""
        s, gain = self.spectrum.s[self._reached], self._gain[self._reached]
        return -s.sqrt() * _on(s, self._phi.remaining(s.cpu().numpy())) * gain


def _form(factor: Tensor, x: Tensor) -> Tensor:
    """||factor x_i||^2 for an upper triangular factor."""
    return triangular_sqnorm(factor, x) if x.device.type == "cpu" else (x @ factor.T).square().sum(1)


def _dots(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """(x * y) @ weights [r, q] for rows x, y [n, r], in pieces that stay in cache: fresh memory costs more."""
    step = max(1, (_PIECE if x.device.type == "cpu" else CHUNK) // max(1, x.shape[1]))
    out, held = x.new_empty(len(x), weights.shape[1]), x.new_empty(min(step, len(x)), x.shape[1])
    for begin in range(0, len(x), step):
        part = slice(begin, min(begin + step, len(x)))
        product = held[: part.stop - begin]
        torch.mul(x[part], y[part], out=product)
        torch.mm(product, weights, out=out[part])
    return out


def _poles(fit: Rational, like: Tensor) -> tuple[Tensor, Tensor]:
    """Poles and residues of a fit, on the device of ``like``."""
    return torch.from_numpy(fit.poles).to(like.device), torch.from_numpy(fit.residues).to(like.device)


def _on(like: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like)


def _pseudo_inverse(s: Tensor) -> Tensor:
    return torch.where(s > 0, 1 / torch.where(s > 0, s, 1.0), 0.0)
