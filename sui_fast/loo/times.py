"""Removal of every sample at many training times, for about the price of the spectrum.

On eigenvector l the dual weights of the others change by

    D_il(t) = d_l(t) g_l - sum_c u_icl a_ic(s_l, t),     a_ic(s, t) = c0(t) r0_ic + sum_q Re(c_q(t) y_icq / (s - p_q))

when sample i leaves (docs/math.md, section 6). As functions of s all 1 / (s - p_q), of all times, nearly lie in spaces
of few dimensions (``bases.py``). Sums over eigenvectors become sums over their bases, the same for all times; only
small products are left to each time.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..spectra import Spectrum
from .bases import Bases, mm
from .blocks import make_blocks
from .filters import TrainingFilter
from .rational import Rational, fit_rationals
from .solve import check_stability, remove_from_spectrum

_WORK = 1 << 19  # float64 elements of one intermediate: what stays in the cache
_TOLERANCE = 1e-13  # what the bases leave out, relative to each resolvent


def remove_at_times(
    spectrum: Spectrum,
    filters: list[TrainingFilter],
    r0: Tensor,
    *,
    cross: Tensor | None,
    convention: str,
    idle: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """||dw||^2 and the mean ||df||^2 of leaving out each sample, at every time.

    Args:
        spectrum: exact spectrum of the training kernel. filters: one per time, alike in all else.
        r0: residual at the initial weights [n, k]. cross: Theta(validation, train) [m k, n k] or None.
        convention, idle: as in ``remove_from_spectrum``.
    Returns:
        [t, n] and [t, n] (None without ``cross``).
    Raises:
        StabilityError: as ``leave_one_out``.
    """
    n, k = r0.shape
    weights = r0.new_empty(len(filters), n)
    predictions = None if cross is None else torch.empty_like(weights)

    def put(places: list[int], found: tuple[Tensor, Tensor | None]) -> None:
        weights[places] = found[0]
        if predictions is not None:
            predictions[places] = found[1]

    common = dict(cross=cross, convention=convention, idle=idle)
    together, changed = [], [phi.without(1, n, convention) for phi in filters]
    alone: dict[object, list[int]] = {}
    for place, (phi, other) in enumerate(zip(filters, changed, strict=True)):
        check_stability(phi, spectrum.top, n)
        ends = float(spectrum.s[0]), spectrum.top
        if phi.is_settled(*ends) and other.is_settled(*ends):
            alone.setdefault("settled", []).append(place)  # nothing is left to learn: the same numbers at all of them
        elif n > 1 and _moves_stably(other, spectrum.top):
            together.append(place)
        else:
            alone[place] = [place]
    fits = fit_rationals([changed[place] for place in together], spectrum.top)
    if together and max(fit.error for fit in fits) <= 1e-6:
        pairs = [(filters[place], changed[place]) for place in together]
        put(together, _Times(spectrum, pairs, fits, r0, **common).sqnorms())
    else:
        alone |= {place: [place] for place in together}
    for places in alone.values():
        removal = remove_from_spectrum(
            spectrum, filters[places[0]], r0, blocks=make_blocks(n, k), as_numpy=False, **common
        )
        put(places, (removal.weight_sqnorm, None if cross is None else removal.prediction_sqnorm))
    return weights, predictions


def _moves_stably(changed: TrainingFilter, top: float) -> bool:
    if changed.time == 0 or changed.eta == 0 or top == 0:
        return False
    return changed.dynamics == "flow" or top < 2 / changed.eta - changed.shift


class _Times:
    """The formula at the head of this file for finite times.

    Letters: b samples of a portion, t times, q poles of all times, v basis functions of all intervals, r eigenvectors,
    p rows of the probe.
    """

    def __init__(self, spectrum: Spectrum, pairs, fits: list[Rational], r0: Tensor, cross, convention: str, idle):
        s, (n, k) = spectrum.s, r0.shape
        self.u, self.s, self.r0 = spectrum.u.view(n, k, len(s)), s, r0
        self.idle = idle.view(n, k).all(1)
        self.g = spectrum.u.T @ r0.reshape(-1)
        most = max(1, *(len(fit.poles) for fit in fits))
        poles = np.full((len(fits), most), -spectrum.top, dtype=complex)  # without residues where a fit has fewer
        residues = np.zeros_like(poles)
        for fit, own, weights in zip(fits, poles, residues, strict=True):
            own[: len(fit.poles)], weights[: len(fit.poles)] = fit.poles, fit.residues
        self.residues = torch.from_numpy(residues).to(s.device)
        self.constants = torch.tensor([fit.constant for fit in fits], dtype=s.dtype, device=s.device)
        resolvents = 1 / (s - torch.from_numpy(poles.reshape(-1, 1)).to(s.device))  # [q, r]
        self.more = torch.stack([_on(s, other) - _on(s, phi) for phi, other in pairs])  # of the filter, [t, r]
        self.moves_more = bool((self.more != 0).any())
        one = torch.ones_like(s)[None]
        functions = torch.cat([resolvents.real, resolvents.imag, one, self.more])
        self.bases = Bases.of(functions, s, float(np.abs(poles).min(initial=spectrum.top)), _TOLERANCE)
        self.resolvents = torch.cat([self.bases.inner(x) for x in (resolvents.real, resolvents.imag)])  # [2 q, v]
        self.tables = self.resolvents.view(2, len(fits), -1, self.bases.size).transpose(0, 1).flatten(1, 2)  # by time
        self.one = self.bases.inner(one[0])
        self.probe = None
        if cross is not None:
            probe = (cross @ spectrum.u) * (s > 0)
            self.probe, self.share = torch.linalg.qr(probe, mode="r").R, k / len(cross)

    def sqnorms(self) -> tuple[Tensor, Tensor | None]:
        """||dw||^2 and the mean ||df||^2, [t, n]."""
        n, k, r = self.u.shape
        times, v = len(self.more), self.bases.size
        found = self.s.new_empty(n, times, 1 if self.probe is None else 2)
        norms = _SqNorms(self)
        predictions = None if self.probe is None else _Predictions(self)
        step = max(1, _WORK // max((k + 1) ** 2 * max(r, len(self.resolvents)), k * times * v))
        for begin in range(0, n, step):
            part = slice(begin, min(begin + step, n))
            coefficients = self.coefficients(part)
            found[part, :, 0] = norms(self.u[part], coefficients)
            if predictions is not None:
                found[part, :, 1] = predictions(self.u[part], coefficients)
        weights, *rest = found.permute(2, 1, 0)
        return weights, rest[0] if rest else None

    def coefficients(self, part) -> Tensor:
        """a on the bases, [b, k, t, v]."""
        u = self.u[part]
        b, k, _ = u.shape
        left, right = torch.triu_indices(k, k, device=u.device)
        moments = torch.cat([u[:, left] * u[:, right], u * self.g], 1)
        moments = torch.complex(*mm(self.bases.inner(moments), self.resolvents.T).chunk(2, -1))  # [b, pairs + k, q]
        kernel = moments.new_empty(b, k, k, moments.shape[2])
        kernel[:, left, right] = kernel[:, right, left] = moments[:, : len(left)]
        times = len(self.residues)
        y = _solve(kernel, moments[:, len(left) :]).view(b, k, times, -1) * self.residues
        y = torch.stack([y.real, -y.imag], 3).permute(2, 0, 1, 3, 4).reshape(times, b * k, -1)  # [t, b k, 2 q / t]
        found = torch.bmm(y, self.tables).view(times, b, k, -1).permute(1, 2, 0, 3)
        found += (self.r0[part][:, :, None] * self.constants)[..., None] * self.one
        found[self.idle[part]] = 0.0
        return found


class _SqNorms:
    """||dw||^2 = sum_l s_l D_l^2 as a form of the coefficients, whose matrix is the same for all times."""

    def __init__(self, times: _Times):
        self.bases, self.s, self.g = times.bases, times.s, times.g
        # the change of the filter is one more row of u, and one more output
        self.more = -times.bases.inner(times.more) if times.moves_more else None
        self.tables = []
        for columns, basis in zip(self.bases.columns, self.bases.basis, strict=True):
            left, right = torch.triu_indices(len(basis), len(basis), device=basis.device)
            self.tables.append((left, right, (basis[left] * basis[right] * self.s[columns]).T))

    def __call__(self, u: Tensor, coefficients: Tensor) -> Tensor:
        """[b, t] of u [b, k, r] and coefficients [b, k, t, v]."""
        if self.more is not None:
            u = torch.cat([u, self.g.expand(len(u), 1, -1)], 1)
            coefficients = torch.cat([coefficients, self.more.expand(len(u), 1, -1, -1)], 1)
        b, k, times, _ = coefficients.shape
        one, other = torch.triu_indices(k, k, device=u.device)
        pairs, total = u[:, one] * u[:, other], 0.0
        for columns, places, (left, right, table) in zip(
            self.bases.columns, self.bases.places, self.tables, strict=True
        ):
            v = places.stop - places.start
            moments = mm(pairs[..., columns], table)
            square = moments.new_empty(b, len(one), v, v)
            square[..., left, right] = square[..., right, left] = moments
            matrix = moments.new_empty(b, k, v, k, v)
            matrix[:, one, :, other] = matrix[:, other, :, one] = square.transpose(0, 1)
            own = coefficients[..., places].transpose(1, 2).reshape(b, times, k * v)
            total = total + (own @ matrix.view(b, k * v, k * v)).mul_(own).sum(2)
        return total.clamp_(min=0.0)


class _Predictions:
    """The mean ||df||^2 over the probe, each interval by the shorter of two ways."""

    def __init__(self, times: _Times):
        self.bases, self.probe, self.share = times.bases, times.probe, times.share
        self.base = (times.more * times.g) @ self.probe.T
        k, count, rows = times.u.shape[1], len(times.more), len(self.probe)
        most = max(max(count, k * len(basis)) * max(rows, basis.shape[1]) for basis in self.bases.basis)
        self.step = max(1, _WORK // most)
        self.room: dict[str, Tensor] = {}

    def __call__(self, u: Tensor, coefficients: Tensor) -> Tensor:
        """[b, t] of u [b, k, r] and coefficients [b, k, t, v]."""
        parts = [slice(begin, begin + self.step) for begin in range(0, len(u), self.step)]
        return torch.cat([self._portion(u[part], coefficients[part]) for part in parts])

    def _portion(self, u: Tensor, coefficients: Tensor) -> Tensor:
        (b, k, times, _), rows = coefficients.shape, len(self.probe)
        moved = self._out("moved", b, times, rows)
        moved.copy_(self.base)
        for columns, places, basis in zip(self.bases.columns, self.bases.places, self.bases.basis, strict=True):
            v, r = basis.shape
            live = min(rows, columns.stop)  # the probe is triangular
            seen, to = self.probe[:live, columns].T, moved[..., :live]
            own = coefficients[..., places].transpose(1, 2).flatten(2)  # [b, t, k v]
            spread = self._out("spread", b, k, v, r)
            torch.mul(u[:, :, None, columns], basis, out=spread)
            spread = spread.view(b, k * v, r)
            if _through_bases(k, v, r, times):
                told = self._out("told", b, k * v, live)
                torch.mm(spread.flatten(0, 1), seen, out=told.flatten(0, 1))
                to.baddbmm_(own, told, alpha=-1)
            else:
                change = self._out("told", b, times, r)
                torch.bmm(own, spread, out=change)
                to.flatten(0, 1).addmm_(change.flatten(0, 1), seen, alpha=-1)
        return moved.square_().sum(2) * self.share

    def _out(self, name: str, *shape: int) -> Tensor:
        """Memory for an intermediate, the same every time: fresh memory is slow."""
        size = math.prod(shape)
        if name not in self.room or self.room[name].numel() < size:
            self.room[name] = self.probe.new_empty(size)
        return self.room[name][:size].view(shape)


def _through_bases(k: int, v: int, r: int, times: int) -> bool:
    """Whether the predictions of every basis function are cheaper than those of the change at every time."""
    return k * v * (r + times) < times * r


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """x [b, k, q] with matrix [b, k, k, q] x = right [b, k, q]; both are overwritten.

    Elimination needs no pivots here: the matrices are u diag(1 / (s - p)) u^T, whose imaginary part is definite, or the
    real one where the pole is real.
    """
    k = right.shape[1]
    for j in range(k):
        factor = matrix[:, j + 1 :, j] / matrix[:, j, j, None]
        matrix[:, j + 1 :, j + 1 :] -= factor[:, :, None] * matrix[:, j, None, j + 1 :]
        right[:, j + 1 :] -= factor * right[:, j, None]
    for j in reversed(range(k)):
        right[:, j] /= matrix[:, j, j]
        right[:, :j] -= matrix[:, :j, j] * right[:, j, None]
    return right


def _on(s: Tensor, phi: TrainingFilter) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(phi(s.cpu().numpy()))).to(s)
