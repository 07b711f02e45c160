"""Removal of every sample at many training times, for about the price of the spectrum.

On eigenvector l the dual weights of the others change by

    D_il(t) = d_l(t) g_l - sum_c u_icl a_ic(s_l, t),     a_ic(s, t) = c0(t) r0_ic + sum_q Re(c_q(t) y_icq / (s - p_q))

when sample i leaves (docs/math.md, section 6). As functions of s all 1 / (s - p_q), of all times, nearly lie in a space
of few dimensions on an interval whose ends differ by a factor of three. With an orthonormal basis of each such space
sums over eigenvectors become sums over the bases, the same for all times; only small products are left to each time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..spectra import Spectrum
from .blocks import make_blocks
from .filters import TrainingFilter
from .rational import Rational, fit_family
from .removal import CHUNK
from .solve import check_stability, remove_from_spectrum

_RATIO = 3.0  # of the ends of an interval
_TOLERANCE = 1e-14  # what a basis leaves out, relative to each function on its interval
_SKETCH = 48  # random combinations of the functions from which a basis is taken; about 16 suffice
_WORK = 1 << 19  # float64 elements of one intermediate: what stays in the cache
_TALL = 128  # samples of a product with a wide table
_SLOW = 1.5  # the small products run at about two thirds of full speed


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
    fits = fit_family([changed[place] for place in together], spectrum.top)
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
    """The formula at the head of this file for finite times, a portion of the samples at a time.

    Letters: b samples of a portion, t times, q poles of a time (filled up with residues of zero), v basis functions of
    all intervals, r eigenvectors, p rows of the probe.
    """

    def __init__(self, spectrum: Spectrum, pairs, fits: list[Rational], r0: Tensor, cross, convention: str, idle):
        s, (n, k) = spectrum.s, r0.shape
        self.u, self.s, self.r0 = spectrum.u.view(n, k, len(s)), s, r0
        self.idle = idle.view(n, k).all(1)
        self.g = spectrum.u.T @ r0.reshape(-1)
        most = max(1, *(len(fit.poles) for fit in fits)) if len(fits) > 1 else max(1, len(fits[0].poles))
        poles = np.full((len(fits), most), -spectrum.top, dtype=complex)
        residues = np.zeros_like(poles)
        for row, fit in enumerate(fits):
            poles[row, : len(fit.poles)], residues[row, : len(fit.poles)] = fit.poles, fit.residues
        self.residues = torch.from_numpy(residues).to(s.device)
        self.constants = torch.tensor([fit.constant for fit in fits], dtype=s.dtype, device=s.device)
        resolvents = 1 / (s - torch.from_numpy(poles.reshape(-1, 1)).to(s.device))  # [t q, r]
        self.bases = _bases(resolvents, s, float(np.abs(poles).min()))
        self.real, self.imag = (self._inner(x) for x in (resolvents.real, resolvents.imag))  # [t q, v]
        self.one = self._inner(torch.ones_like(s))
        rows = [_on(s, other) - _on(s, phi) if other != phi else torch.zeros_like(s) for phi, other in pairs]
        self.beyond = torch.stack(rows) * self.g  # [t, r]
        self.moves_more = bool((self.beyond != 0).any())
        self.probe = None
        if cross is not None:
            probe = (cross @ spectrum.u) * (s > 0)
            if len(probe) > len(s):
                probe = torch.linalg.qr(probe).R
            self.probe, self.share = probe, k / len(cross)

    def _inner(self, x: Tensor) -> Tensor:
        """Coefficients [..., v] of functions of the eigenvalues [..., r]."""
        return torch.cat([_mm(x[..., part], basis.T) for part, basis in self.bases], -1)

    def sqnorms(self) -> tuple[Tensor, Tensor | None]:
        """||dw||^2 and the mean ||df||^2, [t, n]."""
        n, k, r = self.u.shape
        times, v, rows = len(self.beyond), len(self.one), 0 if self.probe is None else len(self.probe)
        # two ways to the predictions: through the changes at every time, or through the predictions of every basis
        spread = sum(len(basis) * basis.shape[1] for _, basis in self.bases)
        through_bases = rows > 0 and k * spread + _SLOW * times * k * v < times * r
        few = max(1, _WORK // max(times * r, k * k * max(r, 2 * len(self.real)), k * v * rows * through_bases))
        many = max(few, min(_TALL, CHUNK // (k * v * max(rows, 1)))) // few * few if through_bases else few
        tables = [(basis[:, None] * self.probe[:, x]).flatten(0, 1).T for x, basis in self.bases * through_bases]
        weights, predictions = self.s.new_empty(n, times), None if rows == 0 else self.s.new_empty(n, times)
        told = self.s.new_empty(many if through_bases else 0, k * v, rows)  # one for all: fresh memory is slow
        for first in range(0, n, many):
            last = min(first + many, n)
            if through_bases:
                self._tell(self.u[first:last], tables, told)
            for begin in range(first, last, few):
                part = slice(begin, min(begin + few, last))
                coefficients = self._coefficients(part)
                moved = None
                if through_bases:
                    moved = coefficients.transpose(1, 2).flatten(2) @ told[begin - first : part.stop - first]
                    moved = self.beyond @ self.probe.T - moved if self.moves_more else moved
                weights[part], moved = self._changes(self.u[part], coefficients, moved)
                if rows:
                    predictions[part] = moved.square_().sum(2) * self.share
        return weights.T, None if rows == 0 else predictions.T

    def _tell(self, u: Tensor, tables: list[Tensor], told: Tensor) -> None:
        """The probe's view of every sample's eigenvectors times every basis function, into [b, k v, p]."""
        b, k, _ = u.shape
        flat = told[:b].view(b * k, -1)
        place = 0
        for (columns, _), table in zip(self.bases, tables, strict=True):
            torch.mm(u[..., columns].reshape(b * k, -1), table, out=flat[:, place : place + table.shape[1]])
            place += table.shape[1]

    def _changes(self, u: Tensor, coefficients: Tensor, moved: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """||dw||^2 [b, t] and the change of the predictions [b, t, p], but where it is given or not asked for."""
        weights, through_changes = 0.0, self.probe is not None and moved is None
        place = 0
        for columns, basis in self.bases:
            found = _mm(coefficients[..., place : place + len(basis)], basis).mul_(u[:, :, None, columns])
            change = found[:, 0] if found.shape[1] == 1 else found.sum(1)  # -D, [b, t, r_j]
            if self.moves_more:
                change = self.beyond[:, columns] - change
            if through_changes:
                seen = _mm(change, self.probe[:, columns].T)
                moved = seen if moved is None else moved.add_(seen)
            weights = weights + change.square_() @ self.s[columns]
            place += len(basis)
        return weights, moved

    def _coefficients(self, part: slice) -> Tensor:
        """a on the bases, [b, k, t, v]."""
        u, (times, most) = self.u[part], self.residues.shape
        k = u.shape[1]
        kernel = self._inner(u[:, :, None] * u[:, None])  # [b, k, k, v]
        right = self._inner(u * self.g)
        kernel, right = (torch.complex(_mm(x, self.real.T), _mm(x, self.imag.T)) for x in (kernel, right))
        y = _solve(kernel, right)
        y = y.reshape(-1, times, most) * self.residues
        y = y.transpose(0, 1)  # [t, b k, q]
        tables = self.real.view(times, most, -1), self.imag.view(times, most, -1)
        found = y.real @ tables[0] - y.imag @ tables[1]
        found = found.transpose(0, 1).reshape(len(u), k, times, -1)
        found += (self.r0[part][:, :, None] * self.constants)[..., None] * self.one
        found[self.idle[part]] = 0.0
        return found


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


def _bases(resolvents: Tensor, s: Tensor, nearest: float) -> list[tuple[slice, Tensor]]:
    """Intervals of eigenvalues, and for each an orthonormal basis [v, r_j] of the functions on it."""
    top, low = float(s[-1]), max(nearest / 16, float(s[-1]) * 1e-15)
    edges = top / _RATIO ** np.arange(max(1, int(np.ceil(np.log(top / low) / np.log(_RATIO)))))
    cuts = np.unique([0, *np.searchsorted(s.cpu().numpy(), edges[1:]), len(s)])
    functions = torch.cat([resolvents.real, resolvents.imag, torch.ones_like(s)[None]])
    mix = torch.randn(_SKETCH, len(functions), generator=torch.Generator().manual_seed(0), dtype=s.dtype).to(s)
    found = []
    for begin, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        part = slice(begin, end)
        basis = torch.eye(end - begin, dtype=s.dtype, device=s.device)
        if end - begin > 8:
            own = functions[:, part]
            size = own.abs().amax(1, keepdim=True)
            own = own / torch.where(size > 0, size, 1.0)
            _, values, rows = torch.linalg.svd(mix @ own, full_matrices=False)
            few = rows[values > _TOLERANCE * values[0]]
            if float((own - (own @ few.T) @ few).abs().max()) < 100 * _TOLERANCE:
                basis = few
        found.append((part, basis))
    return found


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a [..., x] times b [x, y] as one product of two matrices."""
    return (a.reshape(-1, a.shape[-1]) @ b).view(*a.shape[:-1], b.shape[1])


def _on(s: Tensor, phi: TrainingFilter) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(phi(s.cpu().numpy()))).to(s)
