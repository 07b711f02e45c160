"""Anchored sketch: a few leading directions of weight space exactly, the rest of every gradient sketched.

    z(x) = [B x, S x - (S B^T) (B x)],    B orthonormal [q, d], S the random map

B holds the ridge solutions of a pool of samples and the leading right singular vectors of its Jacobian. A sketch errs
in proportion to what it sketches, and what training moves lies mostly in B (figures: docs/low_rank.md). The map stays
linear and unbiased.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from ..jacobians import Anchors, Jacobian, goes_by_kernel, make_anchors, project, sketched_anchors
from ..jacobians.finite import check_squares
from ..jacobians.layers import Outer
from ..ops.sketching._random import signs
from .maps import FeatureMap, sketch_map, sketch_rank

_POOL, _POOL_ROWS = 256, 1024  # samples that the directions are taken from, and rows of these; more of a large rank
ANCHORS, _MANY = 32, 512  # at least, or none; at most
_SHARE = 4  # of the columns that may be anchors: one in so many
_BESIDE = 8  # directions of outputs that the loss leaves alone; a third of the anchors at most
_SOLUTIONS = (1e-1, 1e-2, 1e-3, 1e-4)  # ridge of the pool's solutions, in units of its largest eigenvalue
_MOMENTS = {False: 2.0, True: 6.0}  # operations that anchors may add, in those of Z^T Z; True: no layer has positions
_NOISE, _LEAST = 0.5, 1e-6  # eigenvalues, and squares of what a solution adds, that are rounding
_SECOND = 4e10  # operations that anchors may add over all samples, where these are few
INNER = 1024  # columns of a sketch without anchors, brought down to fewer
_MOST = 1 << 28  # bytes of B; of the explicit rows of a pool


def pool_size(first: Jacobian, n: int, rank: int, kind: str = "tensor", needed: bool = False) -> tuple[int, int]:
    """(samples of a pool, anchors for ``anchored_sketch_map``).

    Without anchors the pool is for ``reduced_sketch_map``; 0 samples for a plain sketch.

    Args:
        first: Jacobian of one sample or more. n: samples to draw from. rank, kind: columns and kind of the sketch.
        needed: anchors whatever they cost but memory, from a pool with a row more for each sample.
    """
    rows, each = min(rank // _SHARE, _POOL_ROWS), first.k + needed
    size = min(n, max(16, min(_POOL, _POOL_ROWS // each), -(-rows // each)))
    if min(rows, size * first.k - 1) <= len(_SOLUTIONS):
        return 0, 0
    count = anchor_count(first, n, rank, size, needed)
    return (size if count or rank < INNER and kind == "tensor" else 0), count


def anchor_count(first: Jacobian, n: int, rank: int, pool: int, needed: bool = False) -> int:
    """Anchors from a pool of so many of n samples: ANCHORS where they are worth it, more where they cost little."""
    most = min(rank // _SHARE, pool * first.k - 1, _MANY)
    count, few = min(ANCHORS, most), n if 2 * rank >= 3 * n * first.k else math.inf
    some = n if rank < INNER else few  # of more columns a sketch of many samples has little to gain
    if count <= len(_SOLUTIONS) or _burden(first, rank, count, pool, some) > (sys.float_info.max if needed else 1):
        return 0
    while count < most and _burden(first, rank, min(2 * count, most), pool, few) <= 0.5:
        count = min(2 * count, most)
    return count


def anchored_sketch_map(
    pool: Jacobian, residual: Tensor, rank: int, seed: int = 0, kind: str = "tensor", count: int | None = None
) -> FeatureMap:
    """Sketch of ``rank`` columns with anchors among them, or without where they would cost more than they are worth.

    Args:
        pool: Jacobian of some samples; rows beyond those of the residual are of outputs that training leaves alone.
        residual: targets minus outputs of these [p, k]. rank, seed, kind: as in ``sketch_map``.
        count: anchors, else by what they cost.
    Source: docs/math.md, section 10; anchors are a control variate (Nystrom part exact, remainder sketched).
    """
    count = anchor_count(pool, pool.n, rank, pool.n) if count is None else count
    if not count:
        return sketch_map(sketch_rank(rank, kind), seed, kind)
    rows = pool.rows() if _explicit(pool, pool.shape[0]) else None
    theta = (pool.gram() if rows is None else rows @ rows.T).to(torch.float64)
    chosen = _directions(theta, residual, count, pool.dtype, seed)
    if chosen is None:
        return sketch_map(sketch_rank(rank, kind), seed, kind)
    columns = sketch_rank(rank - chosen.shape[1], kind)
    if rows is not None and kind == "tensor":
        anchors = Anchors(chosen, chosen.to(rows).T @ rows, [])
        sketched = sketched_anchors(pool, anchors.rows, columns, seed)
    else:
        anchors = make_anchors(pool, chosen)
        sketched = project(pool, anchors, columns, seed, kind, False)[0].flatten(0, 1).to(torch.float64)
        sketched = (chosen.T @ sketched).to(pool.dtype)

    def features(jac: Jacobian, own: bool) -> tuple[Tensor, Tensor | None, list]:
        found, along, blocks, layers = project(jac, anchors, columns, seed, kind, own)
        rest = torch.addmm(found.flatten(0, 1), along.flatten(0, 1), sketched, alpha=-1)
        return torch.cat([along, rest.view(jac.n, jac.k, -1)], 2), blocks, layers

    def portion(own: bool):
        return lambda jac: tuple(x for x in features(jac, own) if x is not None)

    both = lambda jac, own: features(jac, own)[:2]  # noqa: E731
    return FeatureMap("sketch", len(sketched) + columns, both, {"anchors": chosen}, portion)


def reduced_sketch_map(pool: Tensor, residual: Tensor, rank: int, seed: int = 0) -> FeatureMap:
    """Sketch of INNER columns brought down to ``rank``: what anchors are to gradients, here to their sketches.

    z(x) = M^T S x, with B of the sketches and a random P, E<Px, Py> = <x, y>, in place of those of the gradients. It
    costs what the longer sketch does, which is little more than the shorter one where layers are large.

    Args:
        pool: sketches [p, k, INNER] of some samples by ``sketch_map(INNER, seed)``. residual: of these [p, k].
        rank, seed: as in ``sketch_map``.
    Source: docs/math.md, section 10.
    """
    plain, rows = sketch_map(INNER, seed), pool.flatten(0, 1).to(torch.float64)
    count = min(ANCHORS, rank // _SHARE, len(rows) - 1)
    chosen = _directions(rows @ rows.T, residual, count, pool.dtype, seed)
    if chosen is None:
        return sketch_map(sketch_rank(rank, "tensor"), seed)
    known = rows.T @ chosen
    random = torch.linalg.qr(signs(INNER, rank - known.shape[1], 8, 0, seed, rows.device, torch.float64)).Q
    random = random * (INNER / random.shape[1]) ** 0.5  # of fewer columns than rows: E P P^T = 1
    turn = torch.cat([known, random - known @ (known.T @ random)], 1)

    def reduce(sketched: Tensor, own: bool) -> tuple[Tensor, Tensor | None]:
        blocks = sketched @ sketched.transpose(1, 2) if own else None
        return sketched @ turn.to(sketched), blocks

    both = lambda jac, own: reduce(plain.features(jac), own)  # noqa: E731
    return FeatureMap("sketch", rank, both, {"turn": turn}, plain.portion, reduce)


def _directions(theta: Tensor, residual: Tensor, count: int, dtype: torch.dtype, seed: int) -> Tensor | None:
    """[rows, count] of a pool with kernel theta: B = chosen^T J is orthonormal, but for zeros at its end where the pool
    has fewer directions; None where all gradients are zero.

    Args:
        residual: [p, k]. Rows of a sample beyond k are of outputs that the loss leaves alone.
        dtype: of the products of gradients; eigenvalues which its rounding may hide are left out.
    """
    check_squares(float(theta.diagonal().mean()), dtype)
    top = float(theta.diagonal().max())
    if not top > 0:
        return None
    unit = 4.0 ** (math.frexp(top)[1] // 2)  # so that nothing below leaves the range of numbers, whatever the scale
    theta = theta / unit
    rows = torch.arange(len(theta), device=theta.device).view(len(residual), -1)
    trained, beside = rows[:, : residual.shape[1]].reshape(-1), rows[:, residual.shape[1] :].reshape(-1)
    few = min(_BESIDE, count // 3) if len(beside) else 0
    lead, s, u = _leading(theta, trained, count - few - len(_SOLUTIONS), dtype, seed)
    more = [_leading(theta, beside, few, dtype, seed)[0]] if few else []
    pull = u.T @ residual.reshape(-1).to(s)
    solved = [u @ (pull / (s.clamp_min(0) + share * s[-1])) for share in _SOLUTIONS]
    more.append(theta.new_zeros(len(theta), len(solved)).index_copy(0, trained, torch.stack(solved, 1)))
    chosen = lead
    for column in torch.cat(more, 1).T:  # Gram and Schmidt
        size = (column @ theta @ column).clamp_min(1e-300).sqrt()
        column = column / size
        for _ in range(2):
            column = column - chosen @ (chosen.T @ (theta @ column))
        size = column @ theta @ column
        if float(size) > _LEAST:
            chosen = torch.cat([chosen, (column / size.sqrt())[:, None]], 1)
    chosen = chosen * unit**-0.5
    return torch.nn.functional.pad(chosen, (0, count - chosen.shape[1]))  # rounding must not decide on the columns


def beside_directions(pool: Jacobian, k: int, seed: int = 0) -> Tensor:
    """Orthonormal directions [_BESIDE, d], the leading ones of outputs that the loss leaves alone; zeros if fewer.

    Args:
        pool: of some samples, with those outputs after the k rows that are trained.
    """
    theta, rows = pool.gram().to(torch.float64), torch.arange(pool.shape[0], device=pool.device).view(pool.n, -1)
    if not float(theta.diagonal().max()) > 0:
        return pool.outputs.new_zeros(_BESIDE, pool.shape[1])
    chosen = _leading(theta, rows[:, k:].reshape(-1), _BESIDE, pool.dtype, seed)[0]
    return pool.vjp(torch.nn.functional.pad(chosen, (0, _BESIDE - chosen.shape[1])).to(pool.dtype))


def _leading(theta: Tensor, rows: Tensor, count: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal directions [len(theta), count or fewer] of some rows, and eigenvalues and -vectors of their kernel.

    Eigenvectors of nearly equal eigenvalues turn with the last bit, so their span alone is taken from them, and a basis
    of it from random signs: a run that goes on with other threads or batches must find the same features.
    """
    own = theta[rows][:, rows]
    s, u = torch.linalg.eigh((own + own.T) / 2)
    keep = s > _NOISE * torch.finfo(dtype).eps * s[-1]
    keep[: max(0, len(s) - count)] = False
    root, lead = s[keep].sqrt(), u[:, keep]
    drawn = signs(len(s), len(root), 9, 0, seed, s.device, s.dtype)  # weak directions come last, whatever their number
    q, r = torch.linalg.qr(root[:, None] * (lead.T @ drawn))
    found = (lead / root) @ (q * r.diagonal().sign())
    return theta.new_zeros(len(theta), found.shape[1]).index_copy(0, rows, found), s, u


def _explicit(jac: Jacobian, rows: int) -> bool:
    """Whether so many rows may be formed, and save work: a layer of one position does without."""
    positions = any(layer.a.shape[1] > 1 for layer in _layers(jac))
    return positions and jac.outputs.element_size() * rows * jac.shape[1] <= _MOST


def _layers(jac: Jacobian) -> list[Outer]:
    return [factor for factor in jac.select(range(1)).factors() if isinstance(factor, Outer)]


def _burden(first: Jacobian, rank: int, count: int, pool: int, n: float) -> float:
    """Operations that anchors add over those that they may: some times the moment's, of a rank of 1024 or more.

    Over all n samples a second is allowed in any case, where n is not infinite.
    """
    rank, layers = max(rank, 1024), _layers(first)
    explicit = _explicit(first, pool * first.k)
    kernel = lambda layer: not explicit and goes_by_kernel(layer, pool, count)  # noqa: E731
    if not all(map(kernel, layers)) and 4 * count * first.shape[1] > _MOST:
        return math.inf
    flat, added = True, 0.0  # a sample; operations of a transform count three times
    for layer in layers:
        (_, k, positions, o), i = layer.g.shape, layer.a.shape[2]
        transforms, rows = 6.0 * k * positions * rank * math.log2(rank), 2.0 * k * o * i * (positions + 2)
        if positions > 1:  # rows are formed for all, and scattered
            flat = False
            added += rows + 2.0 * k * o * i * count - min(transforms, rows)
        elif kernel(layer):
            added += 2.0 * pool * (i + k * k * o)
        else:
            added += 2.0 * k * o * i * count
    return added / max(_MOMENTS[flat] * 2 * first.k * rank**2, _SECOND / n)
