"""Removal from the inverse of the regularised kernel: converged training, no spectrum needed."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .blocks import Blocks
from .removal import CHUNK, Removal

_MARGIN = 8.0  # over the error of rows found: at most 3.2 times the estimate without it


class DualRemoval(Removal):
    """Converged removal from A = (Theta + shift I)^-1; D_b = -A_:b v_b. No spectrum needed."""

    def __init__(
        self,
        inverse: Tensor,
        shift: float,
        condition: float,
        blocks: Blocks,
        residual: Tensor,
        cross: Tensor | None,
        as_numpy: bool,
        idle: Tensor,
    ):
        super().__init__(blocks, residual, cross, as_numpy, {})
        self._inverse, self._shift, self._idle = inverse, shift, idle
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
            step = max(1, CHUNK // (rows.shape[1] * len(self._inverse)))
            for begin in range(0, len(numbers), step):
                part = rows[begin : begin + step]
                change[numbers[begin : begin + step]] = -torch.einsum(
                    "bm,bmr->br", self._left_out[part], self._inverse[part]
                )
        return change

    @cached_property
    def _moves(self) -> Tensor:
        """Blocks with a row that is not zero."""
        return self.sum_over_blocks((~self._idle).reshape(self.residual.shape).any(1).to(self._inverse)) > 0

    @cached_property
    def _norms(self) -> tuple[Tensor, Tensor, float]:
        """v^T (A - shift A^2)_bb v = ||dw||^2, v^T (I - shift A)_bb v, and the rounding error of the worst ||dw||^2."""
        change = self._change
        explained = self._inverse.new_empty(len(self))  # v^T A_bb v
        for numbers, rows in self._by_size():
            explained[numbers] = -torch.einsum(
                "bm,bm->b", self._left_out[rows], change[torch.from_numpy(numbers)[:, None], rows]
            )
        total = self.sum_over_blocks(self._left_out.square().reshape(self.residual.shape).sum(1))
        weight = explained - self._shift * change.square().sum(1)
        hessian = total - self._shift * explained
        moves = self._moves
        weight, hessian = (
            torch.where(moves, x.clamp_min(0.0), 0.0) for x in (weight, hessian)
        )  # rows of zeros: exactly 0
        cancelled = explained[moves] / weight[moves].clamp_min(torch.finfo(weight.dtype).tiny)
        worst = float(cancelled.max()) if len(cancelled) else 1.0
        return weight, hessian, worst * self.diagnostics["condition"] * torch.finfo(weight.dtype).eps

    @property
    def rounding(self) -> float:
        """Estimated relative error of the worst ||dw||^2: the condition times what cancels in A - shift A^2."""
        return self._norms[2]

    def rounding_by_rows(self, diagonal: Tensor) -> float:
        """The same by rows, which is nearer where directions differ in size: A is of a Cholesky factor just made.

        A Cholesky factor errs by E with |E_ij| of w_i w_j eps, w^2 = diag(Theta) + shift, and ||dw_b||^2 then by
        (w |D_b|)^2 eps (docs/math.md, section 5).

        Args:
            diagonal: of Theta [N].
        """
        root, change = (diagonal + self._shift).sqrt(), self._change
        step = max(1, CHUNK // 8 // len(root))
        spread = torch.cat([part.abs() @ root for part in change.split(step)]).square()
        lost = (spread / self._norms[0].clamp_min(torch.finfo(spread.dtype).tiny))[self._moves]
        return _MARGIN * torch.finfo(spread.dtype).eps * float(lost.max()) if len(lost) else 0.0

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
