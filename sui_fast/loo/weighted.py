"""Removal where some samples have next to no curvature: the loss is certain of them, rightly or wrongly.

In the whitened form such a sample has tiny features and a huge residual, and an eigendecomposition of the kernel loses
both. Here weights, not residuals, are the unknowns, in orthonormal coordinates of the row space of J, where
H = sum_j z_j^T W_j z_j is diagonal, and W_i is never divided by:

    x_q   = (I - W_i z_i S_q z_i^T)^-1 (g_i + W_i z_i S_q b),     b = -sum_j z_j^T g_j,   S_q = 1 / (s - p_q)
    delta = [phi_-i(s) - phi(s)] b + c0 z_i^T g_i + sum_q c_q S_q z_i^T x_q

It loses digits where leverage is near 1, which is where the whitened form is sound.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._errors import StabilityError, complaint
from .blocks import Blocks
from .filters import TrainingFilter
from .rational import fit_rational
from .removal import CHUNK, Removal
from .solve import check_stability


class WeightedProblem:
    """Gradients g [n, k] and Hessians W [n, k, k] of the losses over the kernel theta [n k, n k] of the outputs."""

    def __init__(self, theta: Tensor, slope: Tensor, weight: Tensor, cross: Tensor | None):
        (n, k), self.slope, self.weight = slope.shape, slope, weight
        own, u = torch.linalg.eigh(theta)
        keep = own > len(own) * torch.finfo(own.dtype).eps * own[-1]
        turn = u[:, keep] / own[keep].sqrt()
        z = (u[:, keep] * own[keep].sqrt()).reshape(n, k, -1)
        s, v = torch.linalg.eigh(torch.einsum("nkr,nkl,nls->rs", z, weight, z))
        self.s, self.rows = s.clamp_min(0), z @ v
        self.pull = -torch.einsum("nkr,nk->r", self.rows, slope)
        self.probe = None if cross is None else cross @ turn @ v
        self.idle = (theta == 0).all(1).reshape(n, k).all(1)


class WeightedRemoval(Removal):
    """``loo_residual`` holds the change of each sample's own outputs, [n, k], by the training without its block."""

    def __init__(self, problem: WeightedProblem, phi: TrainingFilter, convention: str, blocks: Blocks):
        super().__init__(blocks, problem.slope, problem.probe, False, {})
        self._problem, self._phi = problem, phi
        s, b, rows = problem.s, problem.pull, problem.rows
        n, k = problem.slope.shape
        check_stability(phi, float(s[-1]), n)
        scale = _on(s, phi)
        self._delta = s.new_empty(len(blocks), len(s))
        self._moved = torch.empty_like(problem.slope)
        error = 0.0
        for removed, numbers in blocks.by_size().items():
            members = blocks.rows(numbers, s.device)[:, ::k] // k
            changed = phi.without(removed, n, convention)
            if removed == n:
                self._delta[numbers] = -scale * b
                self._moved[members] = 0.0
                continue
            fit = None
            if not changed.converged:
                check_stability(changed, float(s[-1]), n)
                fit = fit_rational(changed, float(s[-1]))
                error = max(error, fit.error)
            step = max(1, CHUNK // (removed * k * max(len(s), removed * k)))
            for begin in range(0, len(numbers), step):
                part, own = numbers[begin : begin + step], members[begin : begin + step]
                z = rows[own].flatten(1, 2)
                weight = z.new_zeros(len(part), removed, k, removed, k)
                for i in range(removed):
                    weight[:, i, :, i] = problem.weight[own[:, i]]
                weight = weight.reshape(len(part), removed * k, removed * k)
                delta = _change(z, weight, problem.slope[own].flatten(1), s, b, changed, fit)
                delta += (_on(s, changed) - scale) * b
                if changed == phi:
                    delta[problem.idle[own].all(1)] = 0.0
                self._delta[part] = delta
                self._moved[own] = torch.einsum("bmr,br->bm", z, delta + scale * b).unflatten(1, (removed, k))
        if error > 1e-6:
            got, todo = f"one fitted to {error:.1e} only", "Lower lr, at the edge of stability, or shorten time."
            raise StabilityError(complaint("lr", "a training filter that can be resolved", got, todo))
        smooth = torch.einsum("nkr,nlr,nkl->n", rows * scale, rows, problem.weight)
        self._trace = self.sum_over_blocks(smooth)
        self.diagnostics.update(
            form=("converged" if phi.converged else "finite time, rational") + ", weights",
            rank=len(s),
            effective_dimension=float((scale * s).sum()),
            condition=float((s[-1] + phi.shift) / phi.shift) if phi.shift > 0 else float("inf"),
            eigen_error=0.0,
            filter_error=error,
            poles=1 if phi.converged else len(fit_rational(phi, float(s[-1])).poles),
        )

    def _weight_sqnorm(self) -> Tensor:
        return self._delta.square().sum(1)

    def _hessian_sqnorm(self) -> Tensor:
        return self._delta.square() @ (self._problem.s + self._phi.shift)

    def _predict(self, begin: int, end: int) -> Tensor:
        return self._delta[begin:end] @ self._cross.T

    def _loo_residual(self) -> Tensor:
        return self._moved

    def _leverage(self) -> Tensor:
        return self._trace


def _change(z, weight, slope, s, b, phi: TrainingFilter, fit) -> Tensor:
    """[phi(H - z^T W z) - phi(H)] b + phi(H - z^T W z) z^T g, [blocks, r]."""
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    if fit is None:
        poles, residues, constant = [-phi.shift], [1.0], 0.0
    else:
        poles, residues, constant = fit.poles.tolist(), fit.residues.tolist(), fit.constant
    total = constant * torch.einsum("bmr,bm->br", z, slope)
    for pole, residue in zip(poles, residues, strict=True):
        scaled = z * (1 / (s - pole))
        wide = weight.to(scaled.dtype)
        left = eye - wide @ (scaled @ z.to(scaled.dtype).transpose(1, 2))
        right = slope.to(scaled.dtype) + torch.einsum("bml,bl->bm", wide, scaled @ b.to(scaled.dtype))
        x = torch.linalg.solve(left, right) * residue
        found = torch.einsum("bmr,bm->br", scaled, x)
        total = total + (found.real if found.is_complex() else found)
    return total


def _on(s: Tensor, phi: TrainingFilter) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(phi(s.cpu().numpy()))).to(s)
