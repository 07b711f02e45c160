"""Anchored sketch: a few leading directions of weight space exactly, the rest of every gradient sketched.

    z(x) = [B x, S x - (S B^T) (B x)],    B orthonormal [q, d], S the random map

B holds the ridge solutions of a pool of samples and the leading right singular vectors of its Jacobian. A sketch errs
in proportion to what it sketches, and what training moves lies mostly in B (figures: docs/low_rank.md). The map stays
linear and unbiased.
"""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor

from ..jacobians import Jacobian
from ..jacobians.layers import Outer
from .maps import FeatureMap, sketch_map, sketch_rank

POOL = 256  # samples that the directions are taken from
_ANCHORS = 32
_SOLUTIONS = (1e-1, 1e-2, 1e-3, 1e-4)  # ridge of the pool's solutions, in units of its largest eigenvalue
_SHARE = {True: 2.0, False: 0.75}  # of the operations of the pass that anchors may take; few in all without positions
_MOST = 1 << 28  # bytes of B


def anchored_sketch_map(pool: Jacobian, residual: Tensor, rank: int, seed: int = 0, kind: str = "tensor") -> FeatureMap:
    """Sketch of ``rank`` columns with anchors among them, or without where they would cost more than they are worth.

    Args:
        pool: Jacobian of some samples. residual: targets minus outputs of these [p, k].
        rank, seed, kind: as in ``sketch_map``.
    Source: docs/math.md, section 10; anchors are a control variate (Nystrom part exact, remainder sketched).
    """
    count = min(_ANCHORS, rank // 4, pool.shape[0] - 1)
    layers = [factor for factor in pool.select(range(1)).factors() if isinstance(factor, Outer)]
    flat = all(layer.a.shape[1] == 1 for layer in layers)
    if count <= len(_SOLUTIONS) or not _worth_it(layers, pool, rank, count, flat):
        return sketch_map(sketch_rank(rank, kind), seed, kind)
    theta = pool.gram().to(torch.float64)
    s, u = torch.linalg.eigh((theta + theta.T) / 2)
    if not float(s[-1]) > 0:
        return sketch_map(sketch_rank(rank, kind), seed, kind)
    pull = u.T @ residual.reshape(-1).to(s)
    solved = torch.stack([u @ (pull / (s.clamp_min(0) + share * s[-1])) for share in _SOLUTIONS], 1)
    lead = u[:, len(_SOLUTIONS) - count :]
    chosen = torch.cat([solved, lead], 1)
    chosen = chosen / torch.einsum("nq,nm,mq->q", chosen, theta, chosen).clamp_min(1e-300).sqrt()
    size, turn = torch.linalg.eigh(chosen.T @ theta @ chosen)
    keep = size > 1e-6 * size[-1]
    chosen = chosen @ (turn[:, keep] / size[keep].sqrt())  # B = chosen^T J
    columns = sketch_rank(rank - chosen.shape[1], kind)
    sketched = chosen.T @ pool.sketch(columns, seed, kind).flatten(0, 1).to(torch.float64)
    basis = None if flat else pool.vjp(chosen.to(pool.dtype))

    def both(jac: Jacobian, own: bool) -> tuple[Tensor, Tensor | None]:
        if basis is None:
            along, blocks = jac.gram(pool).to(torch.float64) @ chosen, jac.own_blocks() if own else None
        else:
            along, blocks = jac.jvp_and_own_blocks(basis) if own else (jac.jvp(basis), None)
        along = along.to(torch.float64)
        rest = jac.sketch(columns, seed, kind).flatten(0, 1).to(torch.float64) - along @ sketched
        return torch.cat([along, rest], 1).reshape(jac.n, jac.k, -1), blocks

    return FeatureMap("sketch", len(sketched) + columns, both, {"anchors": chosen})


def _worth_it(layers: list[Outer], pool: Jacobian, rank: int, count: int, flat: bool) -> bool:
    """Whether the anchors' operations are few against those of capture and a sketch of 1024 columns or more."""
    rank = max(rank, 1024)
    if not flat and 4 * count * pool.shape[1] > _MOST:
        return False
    anchors = own = 0.0  # operations of a sample; those of a transform count three times
    for layer in layers:
        (_, k, positions, o), i = layer.g.shape, layer.a.shape[2]
        if flat:
            anchors += 2.0 * min(pool.n, POOL) * (i + k * o)
        else:
            anchors += 2.0 * k * o * i * (2 * positions + count)
        own += 2.0 * positions * i * o * (1 + k) + 6.0 * k * positions * rank * log2(rank)
    return anchors <= _SHARE[flat] * own
