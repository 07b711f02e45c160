"""Rational form of a training filter: phi(x) = constant + sum_q residue_q / (x - pole_q) on [0, top].

Each pole is a resolvent of the NTK, and taking rows out of a resolvent is a small block solve. The poles are those of
the best approximant of exp(-w) on w >= 0: gradient flow is exp with w = eta t x, gradient descent with
w = -t log(1 - eta x), which is a place for the poles in x too. The residues are fitted by least squares to the
*relative* error, as phi spans a range of eta t top, and the largest eigenvalues carry the smallest phi.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .filters import TrainingFilter

_EPS = np.finfo(np.float64).eps
# Of the best approximant of exp(-w), w >= 0, of degree 16, one of each pair (Cody, Meinardus, Varga 1969; the figures:
# Pusa, Nucl. Sci. Eng. 169, 2011, with their correction of 2012). Its error is 1e-15.
_POLES = np.array([
    10.843917078696988 + 19.277446167181652j, 5.264971343442647 + 16.220221473167927j,
    1.413928462488886 + 13.497725698892745j, -1.4193758971856660 + 10.925363484496723j,
    -3.5091036084149181 + 8.4361989858843751j, -4.9931747377179964 + 5.9968817136039423j,
    -5.9481522689511775 + 3.5874573620183222j, -6.4161776990994342 + 1.1941223933701387j,
])  # fmt: skip
_STEPS = 4  # fewer, polynomials of low degree, take the poles of this many
_GONE = 1e-14  # a share of the residual that no longer counts


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
    """Fit phi on [0, top].

    Args:
        phi: the filter, finite time or converged with shift > 0.
        top: largest eigenvalue of the NTK, > 0.
    Returns:
        Rational with relative error usually below 1e-13.
    """
    return fit_rationals([phi], top)[0]


def fit_rationals(filters: list[TrainingFilter], top: float) -> list[Rational]:
    """``fit_rational`` of several filters, those with as many poles in one pass."""
    unit = 2.0 ** math.frexp(top)[1]  # exact; squares of 1e150 would overflow
    found: dict[TrainingFilter, Rational] = {}
    alike: dict[int, list[tuple[TrainingFilter, TrainingFilter, np.ndarray]]] = {}
    for phi in filters:
        if phi.converged:
            found[phi] = Rational(np.array([-phi.shift + 0j]), np.array([1.0 + 0j]), 0.0, _EPS)
        elif phi.dynamics == "gd" and phi.time == 1:
            found[phi] = Rational(np.zeros(0, dtype=complex), np.zeros(0, dtype=complex), phi.eta, _EPS)
        else:
            scaled = replace(phi, shift=phi.shift / unit, eta=phi.eta * unit)
            poles = _poles(scaled, top / unit)
            alike.setdefault(len(poles), []).append((phi, scaled, poles))
    for group in alike.values():
        names, scaled, poles = zip(*group, strict=True)
        found |= zip(names, _fit(scaled, np.stack(poles), top / unit, unit), strict=True)
    return [found[phi] for phi in filters]


def _poles(phi: TrainingFilter, top: float) -> np.ndarray:
    """Where exp has its poles, in x; those of gradient descent also on the far side of 1 / eta, if it goes there."""
    time = max(phi.time, _STEPS) if phi.dynamics == "gd" else phi.time
    eta = max(phi.eta, 1 / (time * top))  # where training barely starts, not too far away
    if phi.dynamics == "flow":
        return _POLES / (eta * time) - phi.shift
    log, _ = phi.log_decay(np.array(top))
    left = np.exp(-_POLES / time)
    poles = (1 - left) / eta - phi.shift
    if phi.eta * (top + phi.shift) > 1 and log > math.log(_GONE):
        poles = np.concatenate([poles, (1 + left) / eta - phi.shift])
    return poles


def _sample_points(phi: TrainingFilter, top: float) -> np.ndarray:
    low = top * min(1e-3 / (phi.eta * max(phi.time, 1.0) * top), 1e-3)
    parts = (
        [0.0, top],
        np.geomspace(low, top, 200),
        top * (1 - np.geomspace(1e-9, 0.5, 80)),
        top * (0.5 - 0.5 * np.cos(np.pi * np.arange(60) / 60)),
    )
    return np.sort(np.concatenate(parts))


def _fit(filters, poles: np.ndarray, top: float, unit: float) -> list[Rational]:
    """Residues at the given poles [t, q] for filters on [0, top]."""
    x = np.stack([_sample_points(phi, top) for phi in filters])
    f = np.stack([phi(points) for phi, points in zip(filters, x, strict=True)])
    flat = np.array([[phi.shift + 1 / (phi.eta * phi.time)] for phi in filters])
    scale = np.maximum(np.abs(f), 0.01 / (x + flat))  # what errors are relative to
    terms = 1 / (x[..., None] - poles[:, None])
    columns = np.concatenate([np.ones_like(x)[..., None], terms.real, -terms.imag], -1) / scale[..., None]
    norms = np.linalg.norm(columns, axis=1, keepdims=True)
    u, s, vt = np.linalg.svd(columns / norms, full_matrices=False)
    inverse = np.where(s > 1e-15 * s[:, :1], 1 / s, 0.0)[..., None]
    back = (vt / norms).transpose(0, 2, 1)
    found = np.zeros((len(x), columns.shape[2], 1))
    for _ in range(3):  # iterative refinement: the Cauchy columns are nearly dependent, their span is what counts
        rest = (f / scale)[..., None] - columns @ found
        found = found + back @ (inverse * (u.transpose(0, 2, 1) @ rest))
    rest = np.abs((f / scale)[..., None] - columns @ found)
    constants, real, imaginary = np.split(found[..., 0], [1, 1 + poles.shape[1]], axis=1)
    residues = real + 1j * imaginary
    size = (np.abs(constants) + (np.abs(residues)[:, None] * np.abs(terms)).sum(2)) / scale
    errors = rest.max((1, 2)) + _EPS * size.max(1)
    return [
        Rational(p * unit, r, float(c[0]) / unit, float(e))
        for p, r, c, e in zip(poles, residues, constants, errors, strict=True)
    ]
