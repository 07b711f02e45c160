"""Feature maps: Theta ~ Z Z^T with Z = map(Jacobian), r columns, for any sample, seen in training or not.

    sketch     Z = J P, P random and fixed (ops.sketch); one pass, nothing to fit
    nystrom    Z = Theta(., L) C^-T, C C^T = Theta(L, L), landmarks L by randomly pivoted Cholesky
    subspace   Z = J B^T, B an orthonormal basis of the leading right singular space of J, by block power iteration

The first is unbiased, the other two lie below Theta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from .._errors import ArgumentError, SpectrumError, complaint
from ..jacobians import Anchors, Jacobian, Sketch, make_anchors, project
from ..jacobians.finite import check_squares
from ..ops.sketching._random import signs
from .moments import BLOCK, add_upper, mirrored

_PART = 256  # samples at a time, at most
_FEW = 128  # of both sides of a kernel in float64
_MOST = 1 << 28  # bytes of directions in any case, and of the float64 factors of samples
_WIDE = 1 << 21  # float64 numbers of one intermediate
_ZEROS = "gradients that are all zero"
RANK_FOR = {"sketch": 40.0, "nystrom": 5.0, "subspace": 2.0}  # ranks per effective dimension, measured (docs/math.md)


@dataclass
class FeatureMap:
    """kind, columns r, and the function (Jacobian, own) -> (features [n, k, r], its own_blocks [n, k, k] or None).

    own: whether the blocks are wanted. state: what it was fitted to, by name.

    portion: for sketches own -> the function for ``jacobians.portions``: no Jacobian of more than a batch is held.
    reduce: (what it gives, own) -> (features, own_blocks), where that is not yet the features.
    """

    kind: str
    rank: int
    both: Callable[[Jacobian, bool], tuple[Tensor, Tensor | None]]
    state: dict[str, Tensor] = field(default_factory=dict)
    portion: Callable[[bool], Callable[[Jacobian], tuple]] | None = None
    reduce: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]] | None = None

    def features(self, jac: Jacobian) -> Tensor:
        """Features [n, k, r] alone."""
        return self.both(jac, False)[0]


def sketch_rank(rank: int, kind: str) -> int:
    """Columns, ``rank`` at least, of a kind of sketch.

    tensor: the next power of two where it is near, else the next number without prime factors above 7; a transform of
    another length takes several times as long. two_sided: a product of two numbers that are nearly equal, as the
    smaller side makes the variance.
    """
    if kind == "two_sided":
        side = math.isqrt(rank)
        return side * -(-rank // side)
    if kind != "tensor":
        return rank
    power = 1 << (rank - 1).bit_length()
    if power <= 1.1 * rank:
        return power
    while True:
        rest = rank
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return rank
        rank += 1


def sketch_map(rank: int, seed: int = 0, kind: str = "tensor") -> FeatureMap:
    """Random projection of the rows; E<Px, Py> = <x, y> over the whole gradient.

    Args:
        rank: columns. seed: of the random numbers. kind: "tensor", "sjlt", "rademacher" or "two_sided".
    Source: Pham and Pagh 2013; docs/math.md, section 10.
    """
    sketch = Sketch(rank, seed, kind)
    return FeatureMap("sketch", rank, lambda jac, own: (sketch(jac)[0], None), portion=lambda own: sketch)


def nystrom_map(pool: Jacobian, rank: int, seed: int = 0, beside: Tensor | None = None) -> FeatureMap:
    """Landmark samples of a pool, drawn in proportion to what the landmarks before them leave unexplained.

    All outputs of a landmark sample serve, so rank is rounded up to whole samples; fewer columns where the pool is
    explained sooner. Of a small rank more landmarks are drawn than columns kept, the leading ones. Where float32
    leaves fewer columns than asked for, as rounding hides small eigenvalues, kernels are computed in float64.

    Args:
        pool: samples to draw from. rank: columns. seed: of the draws.
        beside: orthonormal directions [c, d] with columns of their own, before the others.
    Source: Chen, Epperly, Tropp, Webber 2022 (randomly pivoted Cholesky, blocks).
    """
    rank, drawn = -(-rank // pool.k) * pool.k, []
    of = lambda dtype: _nystrom(pool, rank, seed, dtype, drawn, beside)  # noqa: E731
    return of(pool.dtype) or of(torch.float64)


def _along(jac: Jacobian, beside: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Coordinates [n k, c], float64, computed in this dtype."""
    if beside is None:
        return torch.zeros(jac.shape[0], 0, dtype=torch.float64, device=jac.device)
    step = jac.n if jac.dtype == dtype else _FEW
    parts = [jac.select(range(i, min(i + step, jac.n))) for i in range(0, jac.n, step)]
    return torch.cat([(x if x.dtype == dtype else x.wide()).jvp(beside.to(dtype)).to(torch.float64) for x in parts])


def _nystrom(
    pool: Jacobian, rank: int, seed: int, dtype: torch.dtype, drawn: list[int], beside: Tensor | None = None
) -> FeatureMap | None:
    """``nystrom_map`` by kernels in a dtype; None where float32 leaves fewer columns than asked for.

    drawn: takes the landmarks of a run in float32. In float64 nearly always the same are drawn: the kernel with these
    comes first, as rows of the pool are then formed once for all, in place of once for every draw.
    """
    n, k, wide = pool.n, pool.k, dtype != pool.dtype
    wanted, least = landmarks_of(n, k, rank), 0 if dtype == torch.float64 else min(rank, pool.shape[0])
    rng = torch.Generator().manual_seed(seed)
    diagonal = pool.own_blocks().diagonal(dim1=1, dim2=2).to(torch.float64)
    check_squares(float(diagonal.sum()) / n, pool.dtype)
    here = _along(pool, beside, dtype)
    diagonal = (diagonal - here.square().sum(1).view(n, k)).clamp_min(0)
    if not float(diagonal.sum()) > 0:
        raise SpectrumError(complaint("model", "parameters that act on the outputs", _ZEROS, "Check params=."))
    floor = 1e-12 * float(diagonal.sum())
    chosen: list[int] = []
    rows_of = lambda samples: (torch.tensor(samples)[:, None] * k + torch.arange(k)).reshape(-1).to(pool.device)  # noqa: E731
    known = torch.zeros(n * k, wanted * k, dtype=torch.float64, device=pool.device)
    if wide:
        _fill(known, pool, drawn)
    factor, used = torch.nn.functional.pad(here, (0, known.shape[1])), here.shape[1]
    while len(chosen) < wanted:
        weight = diagonal.sum(1).clamp_min(0).cpu()
        weight[chosen] = 0.0
        if float(weight.sum()) <= floor:
            break
        count = min(wanted - len(chosen), max(1, wanted // 8), int((weight > 0).sum()))
        fresh = torch.multinomial(weight, count, replacement=False, generator=rng).tolist()
        rows, part = rows_of(fresh), slice(len(chosen) * k, (len(chosen) + count) * k)
        if not wide:
            known[:, part] = pool.gram(pool.select(fresh))
        elif drawn[len(chosen) : len(chosen) + count] != fresh:
            drawn = []
            _fill(known[:, part], pool, fresh)
        block = known[:, part] - factor[:, :used] @ factor[rows, :used].T
        # of a block drawn at once some say the same: keep those that still add something
        core = block[rows]
        own, vectors = torch.linalg.eigh((core + core.T) / 2)
        keep = own > 1e-10 * float(own[-1].clamp_min(0)) + floor * 1e-3
        columns = block @ (vectors[:, keep] / own[keep].sqrt())
        factor[:, used : used + columns.shape[1]] = columns
        used += columns.shape[1]
        diagonal = diagonal - columns.square().sum(1).reshape(n, k)
        chosen += fresh
    del factor, block, columns  # as large as what follows
    known, there = known[:, : len(chosen) * k], here[rows_of(chosen)]
    known.addmm_(here, there.T, alpha=-1)
    s, u = torch.linalg.eigh(known[rows_of(chosen)])
    keep = s > len(s) * torch.finfo(dtype).eps * float(s[-1])
    if int(keep.sum()) < least:
        drawn += chosen
        return None
    root = u[:, keep] / s[keep].sqrt()
    if root.shape[1] > rank:
        square = root.new_zeros(root.shape[1], root.shape[1])
        add_upper(square, known @ root)
        root = root @ torch.linalg.eigh(mirrored(square))[1][:, -rank:]
    landmarks = pool.select(chosen)
    whole, turn = coordinates(landmarks.wide() if wide else landmarks, root, pool.nbytes), there.T @ root

    def both(jac: Jacobian, own: bool) -> tuple[Tensor, Tensor | None]:
        features, blocks = whole(jac, own)
        if len(turn):
            along = _along(jac, beside, dtype).view(jac.n, jac.k, -1)
            features = torch.cat([along, features - along @ turn], 2)
        return features, blocks

    state = {"landmarks": torch.tensor(chosen), "root": root}
    return FeatureMap("nystrom", len(turn) + root.shape[1], both, state)


def _fill(known: Tensor, pool: Jacobian, samples: list[int]) -> None:
    """The columns of known [n k, ...] <- kernel of a pool with these samples in float64, as many at a time as fit."""
    k, step = pool.k, landmarks_at_once(pool.k * pool.shape[1], pool.nbytes)
    for begin in range(0, len(samples), step):
        some = samples[begin : begin + step]
        across = coordinates(pool.select(some).wide(), torch.eye(len(some) * k).to(known), pool.nbytes)
        known[:, begin * k : (begin + len(some)) * k] = across(pool, False)[0].flatten(0, 1)


def landmarks_at_once(numbers: int, nbytes: float) -> int:
    """Whose rows in float64, of so many numbers a sample, are formed for the kernel with a pool of so many bytes."""
    return max(8, int(max(_MOST, nbytes / 4) / (8 * numbers)))


def directions_fit(count: int, parameters: int, nbytes: float) -> bool:
    """Whether features of landmarks from a pool of so many bytes go by directions, made in float64."""
    return 12 * count * parameters <= max(_MOST, 2 * nbytes)


def landmarks_of(n: int, k: int, rank: int) -> int:
    """Samples of n whose kernel columns ``nystrom_map`` takes."""
    return min(n, max(rank, min(8 * rank, 256 * k, 2048)) // k)


def coordinates(landmarks: Jacobian, root: Tensor, nbytes: float) -> Callable:
    """(Jacobian, own) -> Theta(., L) root [n, k, q] and own blocks, in the dtype of the landmarks.

    Along the directions root^T J(L), but by the kernel for layers of which that costs less, and where these directions
    are too many for memory.

    Args:
        landmarks: L. root: [l k, q], float64. nbytes: of the pool that the landmarks are from.
    """
    wide = landmarks.dtype == torch.float64
    like = lambda jac: jac.wide() if wide else jac  # noqa: E731
    step = max(1, min(_PART, (_MOST if wide else 2 * _MOST) * landmarks.n // (2 * landmarks.nbytes)))
    if not directions_fit(root.shape[1], landmarks.shape[1], nbytes):

        def by_kernel(jac: Jacobian, own: bool) -> tuple[Tensor, Tensor | None]:
            kernel = _wide_kernel(jac, landmarks) if wide else jac.gram(landmarks).to(torch.float64)
            return (kernel @ root).reshape(jac.n, jac.k, -1), jac.own_blocks() if own else None

        return by_kernel
    held = [landmarks]

    @cache  # when first wanted, as the pool is gone by then
    def anchors() -> Anchors:
        return make_anchors(held.pop(), root, -(-step // 4), False)

    def both(jac: Jacobian, own: bool) -> tuple[Tensor, Tensor | None]:
        parts = (like(jac.select(range(i, min(i + step, jac.n)))) for i in range(0, jac.n, step))
        found = [project(part, anchors(), 0, 0, None, own)[1:3] for part in parts]
        return tuple(torch.cat(x) if x[0] is not None else None for x in zip(*found, strict=True))

    return both


def _wide_kernel(left: Jacobian, right: Jacobian) -> Tensor:
    """Computed in float64, a few samples of both at a time: their factors are float64 meanwhile."""
    parts = [[x.select(range(i, min(i + _FEW, x.n))).wide() for i in range(0, x.n, _FEW)] for x in (left, right)]
    return torch.cat([torch.cat([one.gram(two) for two in parts[1]], 1) for one in parts[0]])


def subspace_columns(rank: int) -> int:
    """Columns with the oversampling."""
    return rank + rank // 2 + 96


def subspace_map(
    passes: Callable[[], Iterable[tuple[int, Jacobian]]],
    samples: int,
    rank: int,
    seed: int = 0,
    reduce: Callable[[Tensor | None], Tensor] = lambda x: x,
    beside: Tensor | None = None,
) -> FeatureMap:
    """Leading right singular space of J, matrix-free: J^T of random signs, then a jvp and a vjp over the data.

    Args:
        passes: called once per pass, yields (number of the first sample, Jacobian) part by part. samples: rows in all.
        rank: columns at least; those of the oversampling stay, for F-SI gains more by them than by another iteration.
        seed: of the start.
        reduce: sums a tensor over processes; it is given None where there are no parts.
        beside: directions [c, d] that join the basis.
    Source: Halko, Martinsson, Tropp 2011; Musco and Musco 2015.
    """
    basis, wide = None, min(subspace_columns(rank), samples)
    for last in (True,) if wide == samples else (False, True):  # of all rows the first pass has the span
        total = None
        for first, part in passes():
            if basis is None and wide == samples:  # all rows: as many random signs may depend on one another
                left = part.outputs.new_zeros(part.shape[0], wide, dtype=part.dtype)
                left.diagonal(first * part.k).fill_(1.0)
            elif basis is None:  # signs by row number: the same start however the rows are shared out
                left = signs(part.shape[0], wide, 4, 0, seed, part.device, part.dtype, first * part.k)
            else:
                left = part.jvp(basis)
            if total is None:
                total = left.new_zeros(left.shape[1], part.shape[1], dtype=torch.float64)
            part.add_vjp(left, total)
            del part, left  # before the next is captured
        # float64 sums in another order are the same in float32; weak directions, and what is rounded after them, hang
        # on the last bit
        total = reduce(total)
        # J^T J v may leave the range of float32; a power of two rounds nothing
        total *= 2.0 ** -math.frexp(max(float(total.max()), -float(total.min())))[1]
        basis = total.to(torch.float32)
        del total
        if last and beside is not None:
            basis = torch.cat([basis, torch.linalg.vector_norm(basis, dim=1).max() * beside.to(basis)])
        _even(basis, torch.float64 if last else torch.float32)

    def both(jac: Jacobian, own: bool) -> tuple[Tensor, Tensor | None]:
        along, blocks = jac.jvp_and_own_blocks(basis) if own else (jac.jvp(basis), None)
        return along.reshape(jac.n, jac.k, -1), blocks

    return FeatureMap("subspace", len(basis), both, {"basis": basis})


def _even(rows: Tensor, dtype: torch.dtype) -> None:
    """rows [r, d] <- L^-1 rows, L L^T = rows rows^T + shift I: the same span, nearly orthonormal, none longer than one.

    Directions weaker than the rounding of rows keep their place, with less weight. The Gram matrix adds up in float64:
    in float32 it would hide directions of a few thousandths of the largest.

    Args:
        dtype: of the last product; weak directions are orthogonal to others only in float64.
    Source: Fukaya et al. 2020 (shifted Cholesky QR).
    """
    gram, step = rows.new_zeros(len(rows), len(rows), dtype=torch.float64), max(1, _WIDE // len(rows))
    for begin in range(0, rows.shape[1], step):
        add_upper(gram, rows[:, begin : begin + step].to(torch.float64).T)
    size = float(gram.diagonal().sum())
    check_squares(size, torch.float64)
    if size == 0:
        raise ArgumentError(complaint("model", "parameters that act on the outputs", _ZEROS, "Check params=."))
    gram = mirrored(gram)
    gram.diagonal().add_(len(rows) * 1e-15 * size)
    root = torch.linalg.cholesky(gram)
    inverse = torch.linalg.solve_triangular(root, torch.eye(len(rows)).to(gram), upper=False).to(dtype)
    for begin in range(0, rows.shape[1], step):
        part = rows[:, begin : begin + step].to(dtype)
        for first in reversed(range(0, len(rows), BLOCK)):  # in place: a block needs those above it
            block = slice(first, first + BLOCK)
            rows[block, begin : begin + step] = inverse[block, : first + BLOCK] @ part[: first + BLOCK]
