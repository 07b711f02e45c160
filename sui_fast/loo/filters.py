"""Training filters: how far each eigen-direction of the NTK is learnt after a given training time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

CONVENTIONS = ("sum", "mean", "iclr2021")
DYNAMICS = ("gd", "flow")


@dataclass(frozen=True)
class TrainingFilter:
    """phi(x) with dual weights alpha = phi(Theta) r0, for x an eigenvalue of Theta (the shift is inside).

    ::

        phi(x) = 1 / (x + shift)                                            time is None (converged)
        phi(x) = (1 - (1 - eta (x + shift))^time) / (x + shift)             dynamics "gd"
        phi(x) = (1 - exp(-eta time (x + shift))) / (x + shift)             dynamics "flow"

    Args:
        shift: lambda = n * reg of the summed loss, >= 0.
        eta: step size lr / n of the summed loss.
        time: steps (gd) or time (flow); None for training to convergence.
        dynamics: "gd" or "flow".

    Source: Harutyunyan et al., ICLR 2021, eqs. 10 and 11 (gradient flow); docs/math.md, section 2.
    """

    shift: float = 0.0
    eta: float = 0.0
    time: float | None = None
    dynamics: str = "gd"

    @property
    def converged(self) -> bool:
        return self.time is None

    def log_decay(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log|E| and sign of E, the share of the residual left in direction x: (1 - eta x')^t or exp(-eta t x')."""
        x = np.asarray(x, dtype=np.float64) + self.shift
        if self.time == 0:
            return np.zeros_like(x), np.ones_like(x)
        if self.dynamics == "flow":
            return -self.eta * self.time * x, np.ones_like(x)
        step = self.eta * x
        with np.errstate(divide="ignore"):
            log = np.where(step < 1, np.log1p(-np.minimum(step, 1.0)), np.log(np.maximum(step - 1, 0.0)))
        sign = np.where((step > 1) & (self.time % 2 == 1), -1.0, 1.0)
        return self.time * log, sign

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """phi(x) in float64, exact to rounding also where eta t x is small (log1p, expm1)."""
        x = np.asarray(x, dtype=np.float64)
        shifted = x + self.shift
        if self.converged:
            with np.errstate(divide="ignore"):
                return 1.0 / shifted
        log, sign = self.log_decay(x)
        left = np.where(sign > 0, -np.expm1(log), 1.0 + np.exp(log))
        zero = shifted == 0
        return np.where(zero, self.eta * self.time, left / np.where(zero, 1.0, shifted))

    def remaining(self, x: np.ndarray) -> np.ndarray:
        """1 - x phi(x), the share of the residual left after training, without cancellation."""
        x = np.asarray(x, dtype=np.float64)
        shifted = x + self.shift
        zero = shifted == 0
        if self.converged:
            return np.where(zero, 1.0, self.shift / np.where(zero, 1.0, shifted))
        log, sign = self.log_decay(x)
        return np.where(zero, 1.0, (self.shift + x * sign * np.exp(log)) / np.where(zero, 1.0, shifted))

    def is_settled(self, smallest: float, largest: float, tolerance: float = 1e-18) -> bool:
        """Whether every direction with eigenvalue in [smallest, largest] has converged below rounding."""
        if self.converged:
            return True
        log, _ = self.log_decay(np.array([smallest, largest]))
        return bool(log.max() < math.log(tolerance))

    def without(self, removed: int, n: int, convention: str) -> TrainingFilter:
        """The filter of the training on n - removed samples (docs/math.md, section 3)."""
        if convention == "sum" or removed == n:
            return self
        factor = n / (n - removed)
        shift = self.shift / factor if convention == "mean" else self.shift
        return replace(self, eta=self.eta * factor, shift=shift)
