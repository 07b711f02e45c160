"""Rational form of a training filter: phi(x) = constant + sum_q residue_q / (x - pole_q) on [0, top].

Each pole is a resolvent of the NTK, and taking rows out of a resolvent is a small block solve. AAA (Nakatsukasa, Sete,
Trefethen 2018) places the poles; the residues are then fitted by least squares. Both minimise the *relative* error, as
phi spans a range of eta t top, and the largest eigenvalues carry the smallest phi.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .filters import TrainingFilter

_EPS = np.finfo(np.float64).eps
_GOOD = 2e-12  # relative error of a fit with which the search ends
_FEW_STEPS = 30
_RINGS = ((16, 1.0), (16, 1.5), (16, 2.5), (28, 0.75), (40, 0.65), (64, 0.57))  # few steps: a polynomial without poles


@dataclass(frozen=True)
class Rational:
    """Poles (one of each conjugate pair, its residue doubled), constant and the error of the fit.

    Attributes:
        poles: complex128 [Q], off the interval [0, top].
        residues: complex128 [Q].
        constant: value at infinity.
        error: largest relative error on the interval, rounding of the sum included.
    """

    poles: np.ndarray
    residues: np.ndarray
    constant: float
    error: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The fitted filter at x: real float64, same shape."""
        x = np.asarray(x, dtype=np.float64)
        return self.constant + (self.residues / (x[..., None] - self.poles)).real.sum(-1)


@lru_cache(maxsize=256)
def fit_rational(phi: TrainingFilter, top: float) -> Rational:
    """Fit phi on [0, top]; the best of the AAA poles and of a few rings of poles around the interval.

    Args:
        phi: the filter, finite time or converged with shift > 0.
        top: largest eigenvalue of the NTK, > 0.
    Returns:
        Rational with relative error usually below 1e-13.
    """
    if phi.converged:
        return Rational(np.array([-phi.shift + 0j]), np.array([1.0 + 0j]), 0.0, _EPS)
    return _in_unit_scale(_fit, phi, top)


def fit_family(filters: list[TrainingFilter], top: float) -> list[Rational]:
    """``fit_rational`` of one training at several finite times.

    At time t the filter is nearly that of a longer time T with eigenvalues scaled by T / t, so the poles of the one
    serve the other; a filter that these do not fit gets its own, which then serve the times before it.
    """
    found: dict[TrainingFilter, Rational] = {}
    base = None
    for phi in sorted(filters, key=lambda phi: -phi.time):
        fit = None
        if base is not None and not (phi.dynamics == "gd" and phi.time == 1):
            poles = (found[base].poles + phi.shift) * (base.time / phi.time) - phi.shift
            fit = _in_unit_scale(_fit_with, phi, top, poles)
        if fit is None or fit.error >= _GOOD:
            base, fit = phi, fit_rational(phi, top)
        found[phi] = fit
    return [found[phi] for phi in filters]


def _in_unit_scale(fit: Callable[..., Rational], phi: TrainingFilter, top: float, *poles: np.ndarray) -> Rational:
    unit = 2.0 ** math.frexp(top)[1]  # exact; squares of 1e150 would overflow
    scaled = replace(phi, shift=phi.shift / unit, eta=phi.eta * unit)
    found = fit(scaled, top / unit, *(x / unit for x in poles))
    return Rational(found.poles * unit, found.residues, found.constant / unit, found.error)


def _fit_with(phi: TrainingFilter, top: float, poles: np.ndarray) -> Rational:
    return _fit_residues(*_samples(phi, top), poles, top)


def _fit(phi: TrainingFilter, top: float) -> Rational:
    """AAA poles and rings of poles; the rings first where phi is a polynomial of low degree, which has no poles."""
    if phi.dynamics == "gd" and phi.time == 1:
        return Rational(np.zeros(0, dtype=complex), np.zeros(0, dtype=complex), phi.eta, _EPS)
    samples = _samples(phi, top)
    polynomial = phi.dynamics == "gd" and phi.time <= _FEW_STEPS
    best = None if polynomial else _fit_residues(*samples, _aaa_poles(*samples), top)
    for count, radius in _RINGS:
        if best is not None and best.error < _GOOD:
            return best
        angles = np.pi * (np.arange(count) + 0.5) / count
        fit = _fit_residues(*samples, top * (0.5 + radius * np.exp(1j * angles)), top)
        best = fit if best is None or fit.error < best.error else best
    if polynomial and best.error >= _GOOD:
        best = min(best, _fit_residues(*samples, _aaa_poles(*samples), top), key=lambda fit: fit.error)
    return best


def _samples(phi: TrainingFilter, top: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points on [0, top], phi there, and what its errors are relative to."""
    points = _sample_points(phi, top)
    values = phi(points)
    return points, values, np.maximum(np.abs(values), 0.01 / (points + phi.shift + 1 / (phi.eta * phi.time)))


def _sample_points(phi: TrainingFilter, top: float) -> np.ndarray:
    rate = phi.eta * max(phi.time, 1.0)
    low = min(1e-3 / rate, 1e-3 * top) if rate > 0 else 1e-3 * top
    parts = (
        [0.0, top],
        np.geomspace(low, top, 400),
        top * (1 - np.geomspace(1e-9, 0.5, 80)),
        top * (0.5 - 0.5 * np.cos(np.pi * np.arange(101) / 100)),
    )
    return np.unique(np.clip(np.concatenate(parts), 0.0, top))


def _aaa_poles(x: np.ndarray, f: np.ndarray, scale: np.ndarray, most: int = 36) -> np.ndarray:
    """Poles of the AAA approximant of f on the points x, relative weights."""
    weight = 1 / scale
    free = np.ones(len(x), dtype=bool)
    approx = np.full_like(f, f.mean())
    support: list[int] = []
    best = (np.inf, None, None)
    for _ in range(most):
        index = int(np.argmax(np.where(free, np.abs(f - approx) * weight, -1.0)))
        support.append(index)
        free[index] = False
        cauchy = 1 / (x[free, None] - x[support])
        loewner = (f[free, None] - f[support]) * cauchy * weight[free, None]
        size = np.linalg.norm(loewner, axis=0)
        barycentric = np.linalg.svd(loewner / np.where(size > 0, size, 1.0), full_matrices=False)[2][-1]
        barycentric = barycentric / np.where(size > 0, size, 1.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            approx = f.copy()
            approx[free] = (cauchy @ (barycentric * f[support])) / (cauchy @ barycentric)
        error = np.nanmax(np.abs(f - approx) * weight)
        if error < best[0]:
            best = (error, list(support), barycentric)
        if error < 3e-14 or len(support) - len(best[1]) > 6:
            break
    _, support, barycentric = best
    return _barycentric_poles(x[support], barycentric)


def _barycentric_poles(nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Zeros of sum_j weights_j / (x - nodes_j), as the finite eigenvalues of an arrowhead pencil.

    v = diag(1 / (x - nodes)) 1 is orthogonal to the weights and (nodes - x) v is parallel to 1: two projections leave a
    regular eigenproblem with one row and one column fewer.
    """
    if len(nodes) < 2:
        return np.zeros(0, dtype=complex)
    right = np.linalg.qr(weights[:, None], mode="complete")[0][:, 1:]
    left = np.linalg.qr(np.ones((len(nodes), 1)), mode="complete")[0][:, 1:]
    matrix = left.T @ (nodes[:, None] * right)
    try:
        return np.linalg.eigvals(np.linalg.solve(left.T @ right, matrix)).astype(complex)
    except np.linalg.LinAlgError:
        return np.zeros(0, dtype=complex)


def _fit_residues(x: np.ndarray, f: np.ndarray, scale: np.ndarray, poles: np.ndarray, top: float) -> Rational:
    outside = np.maximum(np.maximum(-poles.real, poles.real - top), 0.0)
    spread = np.maximum(np.abs(poles.imag), outside)
    gap = np.min(np.abs(x[:, None] - poles), axis=0, initial=np.inf) if len(poles) else np.zeros(0)
    keep = (spread > 1e-3 * gap) & (spread > 1e-12 * top) & np.isfinite(poles) & (np.abs(poles) < 1e4 * top)
    keep &= poles.imag >= -1e-12 * np.abs(poles)
    poles = poles[keep]
    real = np.abs(poles.imag) <= 1e-12 * np.abs(poles)
    poles = np.where(real, poles.real, poles)
    terms = 1 / (x[:, None] - poles)
    columns = np.concatenate([np.ones((len(x), 1)), terms.real, -terms[:, ~real].imag], axis=1) / scale[:, None]
    norms = np.linalg.norm(columns, axis=0)
    columns /= norms
    u, s, vt = np.linalg.svd(columns, full_matrices=False)
    inverse = np.where(s > 1e-15 * s[0], 1 / s, 0.0)
    coefficients = np.zeros(columns.shape[1])
    for _ in range(3):  # iterative refinement: the Cauchy columns are nearly dependent, their span is what counts
        rest = f / scale - columns @ coefficients
        coefficients = coefficients + vt.T @ (inverse * (u.T @ rest))
    coefficients /= norms
    residues = coefficients[1 : 1 + len(poles)].astype(complex)
    residues[~real] += 1j * coefficients[1 + len(poles) :]
    fit = Rational(poles, residues, float(coefficients[0]), 0.0)
    size = np.max((abs(fit.constant) + np.abs(residues * terms).sum(1)) / scale)
    error = np.max(np.abs(fit(x) - f) / scale) + _EPS * size
    return Rational(poles, residues, fit.constant, float(error))
