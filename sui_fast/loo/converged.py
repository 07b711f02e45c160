"""Removing rows from a run that is trained to convergence without regularisation: the limit shift -> 0."""

from __future__ import annotations

import torch
from torch import Tensor


def ridgeless_removal(u: Tensor, s: Tensor, g: Tensor, rest: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """Left-out residual v and change of the minimum-norm solution, the limit of ridge regression for shift -> 0.

    ::

        (null / shift + B) v = rest / shift + a,   B = u diag(1/s) u^T,  a = u (g / s)
        v    = null^+ rest + Q (Q^T B Q)^-1 Q^T (a - B null^+ rest),   Q a basis of the kernel of null
        coef = -(1/s) u^T v

    Rows that the other samples can also produce (null > 0) follow the residual, rows that only the removed block can
    produce (leverage 1) follow the dual weights; a block may hold both kinds.

    Args:
        u: removed rows of the eigenvectors with s > 0, [b, m, r].
        s: positive eigenvalues [r].
        g: U^T r0, [r].
        rest: what no eigenvector reaches of the residual, removed rows, [b, m].
        null: removed block of the projector on the complement of the eigenvectors, [b, m, m].
    Returns:
        v [b, m] and coef [b, r].
    """
    scaled = u / s
    base = scaled @ u.transpose(1, 2)
    a = scaled @ g
    share, basis = torch.linalg.eigh(null)
    reached = (share > 1e-11).to(u.dtype)  # eigenvalues of a block of a projector: 0 up to rounding, or not
    inverse = reached / torch.where(reached > 0, share, 1.0)

    def turn(x: Tensor) -> Tensor:
        return torch.einsum("bmj,bm->bj", basis, x)

    first = inverse * turn(rest)
    inner = basis.transpose(1, 2) @ base @ basis
    todo = (turn(a) - torch.einsum("bij,bj->bi", inner, first)) * (1 - reached)
    keep = (1 - reached)[:, :, None] * (1 - reached)[:, None, :]
    second = torch.linalg.solve(inner * keep + torch.diag_embed(reached), todo)
    v = torch.einsum("bmj,bj->bm", basis, first + second)
    return v, -torch.einsum("bmr,bm->br", scaled, v)
