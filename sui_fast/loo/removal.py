"""Removal: what changes when a block of samples is left out, for every block, from one factorisation.

Two forms, both with D_b = alpha without b - alpha in the coordinates in which they are cheap:

* ``spectral.py`` (any training time): coefficients of D_b on the eigenvectors of Theta;
* ``dual.py`` (converged, well conditioned): D_b = -A_:b v_b with A = (Theta + shift I)^-1.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .blocks import Blocks

CHUNK = 1 << 25  # float64 elements of one intermediate: 256 MB


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
        step = max(1, CHUNK // max(probes, 1))
        parts = [self._predict(b, b + step).square().sum(1) for b in range(0, len(self), step)]
        return torch.cat(parts) * (self._blocks.k / probes)
