"""Leave-one-out by real refits in extended precision: the judge of ``leave_one_out`` and ``score``.

Nothing here comes from the library. Every reduced Jacobian (rows of the block set to zero, which is the same as
deleting them) gets its own singular value decomposition by one-sided Jacobi rotations in ``np.longdouble``; the trained
weights follow in weight space, w = J^T phi(J J^T + lambda I) r0, for any time, regularisation and convention.
Features drawn by ``make_problem`` lie on a binary grid, so that J J^T is exact in float64 and the library is given
exactly the matrix which is judged.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

REAL = np.longdouble
GRID = 2.0**-20


def orthogonal_columns(a: np.ndarray, sweeps: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """A [b, p, q] -> B [b, p, q], V [b, q, q] with A V = B, V orthogonal, columns of B orthogonal (Hestenes 1958)."""
    b, _, q = a.shape
    even = q + q % 2
    rows = np.zeros((b, even, a.shape[1]), REAL)
    rows[:, :q] = a.transpose(0, 2, 1)
    v = np.broadcast_to(np.eye(even, dtype=REAL), (b, even, even)).copy()
    eps = np.finfo(REAL).eps
    floor = (eps * np.sqrt((rows**2).sum((1, 2), keepdims=True)[..., 0])) ** 2
    order = list(range(even))
    for _ in range(sweeps):
        rotated = False
        for _ in range(even - 1):
            x, y = order[: even // 2], order[even // 2 :][::-1]
            order = [order[0], order[-1], *order[1:-1]]
            rx, ry = rows[:, x], rows[:, y]
            xx, yy, xy = (rx * rx).sum(2), (ry * ry).sum(2), (rx * ry).sum(2)
            turn = (np.abs(xy) > 4 * eps * np.sqrt(xx * yy)) & (np.minimum(xx, yy) > floor)
            if not turn.any():
                continue
            rotated = True
            zeta = (yy - xx) / np.where(turn, 2 * xy, 1)
            t = np.where(turn, np.where(zeta < 0, -1, 1) / (np.abs(zeta) + np.sqrt(1 + zeta * zeta)), 0)
            c = 1 / np.sqrt(1 + t * t)
            c, s = c[..., None], (c * t)[..., None]
            rows[:, x], rows[:, y] = c * rx - s * ry, s * rx + c * ry
            vx, vy = v[:, x], v[:, y]
            v[:, x], v[:, y] = c * vx - s * vy, s * vx + c * vy
        if not rotated:
            break
    return rows[:, :q].transpose(0, 2, 1), v[:, :q, :q].transpose(0, 2, 1)


def training_filter(x: np.ndarray, time: float | None, eta: float, dynamics: str) -> np.ndarray:
    """phi(x): 1/x at convergence (0 at x = 0), (1 - (1 - eta x)^t)/x or (1 - exp(-eta t x))/x at time t."""
    x = x.astype(REAL)
    safe = np.where(x > 0, x, 1)
    if time is None:
        return np.where(x > 0, 1 / safe, 0)
    if dynamics == "flow":
        return np.where(x > 0, -np.expm1(-REAL(eta) * REAL(time) * safe) / safe, REAL(eta) * REAL(time))
    z = REAL(eta) * safe
    small = -np.expm1(REAL(time) * np.log1p(-np.where(z < 1, z, 0)))
    sign = -1 if int(time) % 2 else 1
    base = np.abs(1 - z)
    power = REAL(time) * np.log(np.where((z >= 1) & (base > 0), base, 1))  # exp(power) = base^t where it is needed
    big = 1 - sign * np.exp(power) * (base > 0)
    return np.where(x > 0, np.where(z < 1, small, big) / safe, REAL(eta) * REAL(time))


@dataclass
class Refits:
    """What real refits say; b blocks, [b, ...] unless said otherwise. ``w`` [d]: weights trained on everything."""

    w: np.ndarray
    dw: np.ndarray
    prediction_change: np.ndarray | None  # [b, m, k]
    loo_residual: np.ndarray  # [n, k]
    leverage: np.ndarray

    @property
    def weight_sqnorm(self) -> np.ndarray:
        return (self.dw**2).sum(1)

    @property
    def prediction_sqnorm(self) -> np.ndarray:
        return (self.prediction_change**2).sum(2).mean(1)


@dataclass
class Problem:
    """Features jacobian [n k, d], residual r0 = y - f0 [n, k], probe features cross [m k, d], one label per sample."""

    jacobian: np.ndarray
    residual: np.ndarray
    cross: np.ndarray | None = None
    groups: np.ndarray | None = None

    @property
    def ntk(self) -> np.ndarray:
        return self.jacobian @ self.jacobian.T

    @property
    def cross_ntk(self) -> np.ndarray | None:
        return None if self.cross is None else self.cross @ self.jacobian.T

    @property
    def blocks(self) -> list[np.ndarray]:
        n = len(self.residual)
        labels = np.arange(n) if self.groups is None else np.asarray(self.groups)
        return [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def rows(self, block: np.ndarray) -> np.ndarray:
        k = self.residual.shape[1]
        return (block[:, None] * k + np.arange(k)).ravel()

    @cached_property
    def _decompositions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """Of everything, then without each block: B, V, squared singular values, whether of J (else of J^T)."""
        tall = self.jacobian.shape[0] >= self.jacobian.shape[1]
        stack = np.repeat(self.jacobian.astype(REAL)[None], len(self.blocks) + 1, 0)
        for matrix, block in zip(stack[1:], self.blocks, strict=True):
            matrix[self.rows(block)] = 0
        b, v = orthogonal_columns(stack if tall else stack.transpose(0, 2, 1))
        s2 = (b**2).sum(1)
        top = s2[:1].max()
        return b, v, np.where(s2 > top * REAL(1e-14) ** 2, s2, 0), tall

    @property
    def lambda_max(self) -> float:
        return float(self._decompositions[2][0].max())

    def _train(self, which: int, shift: float, time: float | None, eta: float, dynamics: str) -> np.ndarray:
        b, v, s2, tall = (x[which] if isinstance(x, np.ndarray) else x for x in self._decompositions)
        phi = training_filter(s2 + REAL(shift), time, eta, dynamics) * (s2 > 0)
        r0 = self.residual.astype(REAL).ravel()
        return v @ (phi * (b.T @ r0)) if tall else b @ (phi * (v.T @ r0))

    def refit(
        self,
        reg: float = 0.0,
        time: float | None = None,
        lr: float | None = None,
        dynamics: str = "gd",
        convention: str = "sum",
    ) -> Refits:
        """Train on everything and again without each block; reg and lr are those of the mean loss."""
        n, k = self.residual.shape
        shift, eta = REAL(n) * REAL(reg), REAL(lr or 0) / n
        w = self._train(0, shift, time, eta, dynamics)
        r0, jac = self.residual.astype(REAL), self.jacobian.astype(REAL)
        dw, loo = [], np.empty((n, k), REAL)
        for number, block in enumerate(self.blocks, start=1):
            left = n - len(block)
            eta_out, shift_out = eta, shift
            if convention != "sum" and left:
                eta_out = REAL(lr or 0) / left
            if convention == "mean":
                shift_out = REAL(left) * REAL(reg)
            without = self._train(number, shift_out, time, eta_out, dynamics) if left else np.zeros_like(w)
            dw.append(without - w)
            loo[block] = (r0.ravel()[self.rows(block)] - jac[self.rows(block)] @ without).reshape(-1, k)
        dw = np.array(dw)
        change = None if self.cross is None else (dw @ self.cross.astype(REAL).T).reshape(len(dw), -1, k)
        return Refits(w, dw, change, loo, self._leverage(shift, time, eta, dynamics))

    def _leverage(self, shift: float, time: float | None, eta: float, dynamics: str) -> np.ndarray:
        b, v, s2, tall = (x[0] if isinstance(x, np.ndarray) else x for x in self._decompositions)
        phi = training_filter(s2 + shift, time, eta, dynamics) * (s2 > 0)
        diagonal = (b * b) @ phi if tall else (v * v) @ (phi * s2)  # B = U s, so B B is U U s2 already
        return np.array([diagonal[self.rows(block)].sum() for block in self.blocks])


def on_grid(x: np.ndarray, grid: float = GRID) -> np.ndarray:
    return np.round(x / grid) * grid


def make_problem(
    n: int, k: int, d: int, duplicates: str = "no", m: int = 5, seed: int = 0, same: bool = False
) -> Problem:
    """Random features with a spread of scales; duplicates "no", "exact" or "near" (noise 1e-3) of the first third.

    Duplicates get residuals of their own, or (``same``) those of their originals.
    """
    rng = np.random.default_rng(seed)
    jacobian = rng.standard_normal((n, k, d)) * np.logspace(0, -1, d) / np.sqrt(d)
    residual = rng.standard_normal((n, k))
    copies = 0 if duplicates == "no" else max(1, n // 3)
    if copies:
        noise = 1e-3 * rng.standard_normal((copies, k, d)) * (duplicates == "near") / np.sqrt(d)
        jacobian[-copies:] = jacobian[:copies] + noise
        if same:
            residual[-copies:] = residual[:copies]
    cross = rng.standard_normal((m * k, d)) / np.sqrt(d)
    return Problem(on_grid(jacobian.reshape(n * k, d)), residual, on_grid(cross))


def relative_error(got: np.ndarray, want: np.ndarray, zero: float = 0.0) -> float:
    """Largest |got - want| / |want|; entries with |want| <= zero count as 0 when |got| <= zero too, else as inf."""
    got, want = np.asarray(got).astype(REAL), np.asarray(want).astype(REAL)
    if got.shape != want.shape or not np.isfinite(got.astype(np.float64)).all():
        return float("inf")
    null = np.abs(want) <= zero
    error = np.abs(got - want) / np.where(null, 1, np.abs(want))
    return float(np.where(null, np.where(np.abs(got) <= zero, 0, np.inf), error).max(initial=0))
