"""What a sample would add that was never trained on: removal from the enlarged data set, without enlarging it.

In weight coordinates along the eigenvectors, Z^T Z = diag(s), a new sample with rows z adds z^T z to the spectrum. A
resolvent with pole p then changes by a k x k solve (Woodbury), as in removal with the opposite sign:

    y_q   = (1 + z S_q z^T - unseen / p_q)^-1 (r - z S_q gain),   S_q = 1 / (s - p_q)
    delta = [phi_+(s) - phi(s)] gain + c0 z^T r + sum_q Re c_q S_q z^T y_q      along what training has reached
    d     = c0 r - sum_q Re c_q y_q / p_q                                       dual weights of the rest of the sample

with unseen = Theta_ii - z z^T, what only the new sample reaches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .._errors import StabilityError, complaint
from ..spectra import dense_spectrum
from .filters import TrainingFilter
from .rational import fit_rational
from .solve import check_stability

_NOTHING = 1e-10  # of Theta_ii: unseen shares below this are rounding


@dataclass(frozen=True)
class Addition:
    """Effect of adding each of c samples to the linearised model; attributes as of ``Removal``.

    Attributes:
        rows: z [c, k, r]. inside: change of the weights along the eigenvectors, [c, r]. beyond: dual weights of what
            only the sample reaches, [c, k]; unseen: its Gram matrix, [c, k, k].
        loo_residual: targets minus predictions of the model trained without the sample, [c, k].
        leverage: trace of the sample's block of the smoother once it is added, [c].
        shift: lambda. prediction_sqnorm: mean squared change of the predictions [c], where validation was given.
    """

    rows: Tensor
    inside: Tensor
    beyond: Tensor
    unseen: Tensor
    loo_residual: Tensor
    leverage: Tensor
    s: Tensor
    shift: float
    prediction_sqnorm: Tensor | None = None

    def _outside_sqnorm(self) -> Tensor:
        share, basis = torch.linalg.eigh(self.unseen)
        # dual weights are large where nothing is unseen (residual / shift): what rounding leaves there must not count
        known = share <= share.shape[1] * torch.finfo(share.dtype).eps * share[:, -1:]
        along = torch.einsum("ckj,ck->cj", basis, self.beyond)
        return (share.masked_fill(known, 0.0) * along.square()).sum(1)

    @property
    def weight_sqnorm(self) -> Tensor:
        return self.inside.square().sum(1) + self._outside_sqnorm()

    @property
    def hessian_sqnorm(self) -> Tensor:
        """dw^T H dw with H = J^T J + shift of the enlarged set."""
        own = torch.einsum("ckr,cr->ck", self.rows, self.inside) + torch.einsum("ckl,cl->ck", self.unseen, self.beyond)
        known = self.inside.square() @ (self.s + self.shift) + self.shift * self._outside_sqnorm()
        return known + own.square().sum(1)

    def sum_over_blocks(self, per_sample: Tensor) -> Tensor:
        return per_sample


def add_samples(
    rows: Tensor,
    unseen: Tensor,
    residual: Tensor,
    s: Tensor,
    gain: Tensor,
    phi: TrainingFilter,
    *,
    n: int,
    convention: str = "sum",
) -> Addition:
    """What each new sample would change if it were trained on as well.

    Args:
        rows: z [c, k, r], the samples' Jacobian along the eigenvectors in weight space. unseen: Theta_ii - z z^T
            [c, k, k]. residual: targets minus initial outputs [c, k].
        s: eigenvalues of the n samples [r]. gain: Z^T r0 [r]. phi: their training filter.
        convention: as in ``leave_one_out``; a sample more changes eta and lambda by n / (n + 1).
    Returns:
        Addition, without prediction_sqnorm.
    Raises:
        StabilityError: lr that is unstable once the sample is added.
    """
    scale = torch.where(s > 0, torch.from_numpy(np.ascontiguousarray(phi(s.cpu().numpy()))).to(s), 0.0)
    left_out = residual - rows @ (scale * gain)
    own = rows.square().sum((1, 2)) + unseen.diagonal(dim1=1, dim2=2).sum(1)
    seen = unseen * (unseen.diagonal(dim1=1, dim2=2).sum(1) > _NOTHING * own)[:, None, None]
    grown = phi.without(-1, n, convention)
    top = float(s[-1]) + float(own.max())
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    if grown.converged or grown.shift > 0 and grown.is_settled(0.0, top):
        if grown.shift > 0:
            weight = 1 / (s + grown.shift)
            kernel = eye + (rows * weight) @ rows.transpose(1, 2) + seen / grown.shift
            y = torch.linalg.solve(kernel, residual - rows @ (weight * gain))
            beyond = y / grown.shift
            leverage = rows.shape[1] - torch.linalg.inv(kernel).diagonal(dim1=1, dim2=2).sum(1)
        else:
            weight = torch.where(s > 0, 1 / torch.where(s > 0, s, 1.0), 0.0)
            y, beyond, leverage = _ridgeless(eye + (rows * weight) @ rows.transpose(1, 2), seen, left_out)
        inside = torch.einsum("ckr,ck->cr", rows * weight, y) + (weight - scale) * gain
        return Addition(rows, inside, beyond, seen, left_out, leverage, s, grown.shift)
    check_stability(grown, top, n)
    fit = fit_rational(grown, top)
    if fit.error > 1e-6:
        got = f"one fitted to {fit.error:.1e} only"
        raise StabilityError(complaint("lr", "a training filter that can be resolved", got, "Lower lr or time."))
    then = torch.from_numpy(np.ascontiguousarray(grown(s.cpu().numpy()))).to(s)
    inside = fit.constant * torch.einsum("ckr,ck->cr", rows, residual) + torch.where(s > 0, then - scale, 0.0) * gain
    beyond = fit.constant * residual
    smooth = fit.constant * (rows @ rows.transpose(1, 2) + seen)
    for pole, residue in zip(fit.poles.tolist(), fit.residues.tolist(), strict=True):
        resolvent = 1 / (s - pole)
        scaled = rows * resolvent
        block = scaled @ rows.to(scaled.dtype).transpose(1, 2) - seen / pole
        y = torch.linalg.solve(eye + block, residual - scaled @ gain.to(scaled.dtype)) * residue
        inside = inside + torch.einsum("ckr,ck->cr", scaled, y).real
        beyond = beyond - (y / pole).real
        smooth = smooth + (torch.linalg.solve(eye + block, block) * residue).real
    return Addition(rows, inside, beyond, seen, left_out, smooth.diagonal(dim1=1, dim2=2).sum(1), s, grown.shift)


def add_to_kernel(
    theta: Tensor,
    r0: Tensor,
    across: Tensor,
    own: Tensor,
    residual: Tensor,
    phi: TrainingFilter,
    *,
    cross: Tensor | None = None,
    reach: Tensor | None = None,
    convention: str = "sum",
) -> Addition:
    """``add_samples`` from kernels.

    Args:
        theta: [N, N] of the n samples. r0: [n, k]. across: Theta(new, X) [c k, N]. own: Theta_ii of the new [c, k, k].
        residual: of the new [c, k]. cross: Theta(validation, X) [m k, N]; reach: Theta(validation, new) [m k, c k].
    """
    spectrum, (n, k) = dense_spectrum(theta), r0.shape
    root = spectrum.s.sqrt()
    turn = spectrum.u * torch.where(root > 0, 1 / torch.where(root > 0, root, 1.0), 0.0)
    rows = (across.to(theta) @ turn).reshape(-1, k, len(root))
    unseen = own.to(theta) - rows @ rows.transpose(1, 2)
    gain = root * (spectrum.u.T @ r0.reshape(-1))
    found = add_samples(rows, unseen, residual, spectrum.s, gain, phi, n=n, convention=convention)
    if cross is None:
        return found
    probe = cross @ turn
    reach = reach.to(theta) - probe @ rows.flatten(0, 1).T
    moved = found.inside @ probe.T + torch.einsum("mck,ck->cm", reach.unflatten(1, (-1, k)), found.beyond)
    return replace(found, prediction_sqnorm=moved.square().sum(1) * (k / len(probe)))


def _ridgeless(kernel: Tensor, unseen: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The limit shift -> 0: what only the sample reaches is fitted without a change of the rest."""
    share, basis = torch.linalg.eigh(unseen)
    fresh = (share > 0.5 * _NOTHING * share[:, -1:].clamp_min(torch.finfo(share.dtype).tiny)).to(kernel.dtype)
    keep = (1 - fresh)[:, :, None] * (1 - fresh)[:, None, :]
    inner = basis.transpose(1, 2) @ kernel @ basis
    turned = torch.einsum("ckj,ck->cj", basis, left_out)
    old = torch.linalg.solve(inner * keep + torch.diag_embed(fresh), turned * (1 - fresh))
    y = torch.einsum("ckj,cj->ck", basis, old)
    rest = turned - torch.einsum("cij,cj->ci", inner, old)
    beyond = torch.einsum("ckj,cj->ck", basis, fresh * rest / torch.where(fresh > 0, share, 1.0))
    settled = torch.linalg.inv(inner * keep + torch.diag_embed(fresh)).diagonal(dim1=1, dim2=2)
    return y, beyond, fresh.sum(1) + ((1 - fresh) * (1 - settled)).sum(1)
