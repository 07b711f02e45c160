"""Removal of every sample at many training times, for about the price of the spectrum.

On eigenvector l the dual weights of the others change by

    D_il(t) = d_l(t) g_l - sum_c u_icl a_ic(s_l, t),     a_ic(s, t) = c0(t) r0_ic + sum_q Re(c_q(t) y_icq / (s - p_q))

when sample i leaves (docs/math.md, section 6). As functions of s all 1 / (s - p_q), of all times, nearly lie in spaces
of few dimensions (``bases.py``). Sums over eigenvectors become sums over their bases, the same for all times; only
small products are left to each time (``lengths.py``).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..spectra import Spectrum
from .bases import Bases, mm
from .blocks import make_blocks
from .filters import TrainingFilter
from .lengths import Straight, ThroughBases, is_shorter
from .rational import Rational, fit_rationals
from .solve import check_stability, remove_from_spectrum

_WORK = 1 << 20  # float64 elements of one intermediate: what stays in the cache
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
        self.count = len(fits)
        most = max(1, *(len(fit.poles) for fit in fits))
        poles = np.full((len(fits), most), -spectrum.top, dtype=complex)  # without residues where a fit has fewer
        residues = np.zeros_like(poles)
        for fit, own, weights in zip(fits, poles, residues, strict=True):
            own[: len(fit.poles)], weights[: len(fit.poles)] = fit.poles, fit.residues
        self.residues = torch.from_numpy(residues).to(s.device)
        self.constants = torch.tensor([fit.constant for fit in fits], dtype=s.dtype, device=s.device)
        shifted = s - torch.from_numpy(poles.reshape(-1, 1)).to(s.device)  # [q, r]
        resolvents = torch.view_as_real(1 / shifted).movedim(2, 0).reshape(-1, len(s))  # [2 q, r]
        functions, self.more = [resolvents, torch.ones_like(s)[None]], None
        if any(other != phi for phi, other in pairs):
            self.more = torch.stack([_on(s, other) - _on(s, phi) for phi, other in pairs])  # of the filter, [t, r]
            functions.append(self.more)
        functions = torch.cat(functions)
        self.bases = Bases.of(functions, s, float(np.abs(poles).min(initial=spectrum.top)), _TOLERANCE)
        inner = self.bases.inner(functions)
        real, imaginary = inner[: len(resolvents)].view(2, len(fits), -1, self.bases.size)
        one = inner[len(resolvents)].expand(len(fits), 1, -1)
        self.resolvents = inner[: len(resolvents)].T.contiguous()  # [v, 2 q]
        self.tables = torch.cat([-real, imaginary, -one], 1)  # by time, [t, 2 q / t + 1, v]
        self.probe = None
        if cross is not None:
            self.probe, self.share = (cross @ spectrum.u) * (s > 0), k / len(cross)

    def sqnorms(self) -> tuple[Tensor, Tensor | None]:
        """||dw||^2 and the mean ||df||^2, [t, n]."""
        n, k, r = self.u.shape
        found = self.s.new_empty(n, self.count, 1 if self.probe is None else 2)
        lengths = (ThroughBases if is_shorter(self) else Straight)(self)
        step = max(1, _WORK // max((k + 1) ** 2 * max(r, self.resolvents.shape[1]), k * self.count * self.bases.size))
        for begin in range(0, n, step):
            part = slice(begin, begin + step)
            found[part] = lengths(self.u[part], self.coefficients(part))
        weights, *rest = found.permute(2, 1, 0)
        return weights, rest[0] * self.share if rest else None

    def coefficients(self, part) -> Tensor:
        """-a on the bases, [b, t, v, k]."""
        u = self.u[part]
        b, k, _ = u.shape
        left, right = torch.triu_indices(k, k, device=u.device)
        moments = torch.cat([u[:, left] * u[:, right], u * self.g], 1)
        moments = torch.complex(*mm(self.bases.inner(moments), self.resolvents).chunk(2, -1))  # [b, pairs + k, q]
        kernel = moments.new_empty(b, k, k, moments.shape[2])
        kernel[:, left, right] = kernel[:, right, left] = moments[:, : len(left)]
        y = _solve(kernel, moments[:, len(left) :]).view(b, k, self.count, -1) * self.residues
        own = self.r0[part][:, :, None] * self.constants
        y = torch.cat([y.real, y.imag, own[..., None]], 3)
        y[self.idle[part]] = 0.0
        found = torch.bmm(y.permute(2, 0, 1, 3).reshape(self.count, b * k, -1), self.tables)
        return found.view(self.count, b, k, -1).permute(1, 0, 3, 2).contiguous()


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
