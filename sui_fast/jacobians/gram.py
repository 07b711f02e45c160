"""The NTK tile by tile from per-layer factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._errors import ArgumentError, complaint
from ..ops import ntk_gram, ntk_gram_sum
from ..ops.gram import long_product, rows_are_fewer
from .layers import Factor, Index, Outer, Rows
from .tokens import token_jvp

if TYPE_CHECKING:
    from .jacobian import Jacobian


def gram(left: Jacobian, right: Jacobian | None, *, memory: int, progress: bool) -> Tensor:
    """Theta [N, N']: the upper triangle of tiles where ``right`` is None, mirrored; see ``Jacobian.gram``."""
    symmetric = right is None
    right = left if right is None else right
    if left._shapes != right._shapes or left.dtype != right.dtype:
        raise ArgumentError(
            complaint(
                "other",
                "a Jacobian of the same parameters and dtype",
                repr(right),
                "Build both from one model with the same params= and dtype=.",
            )
        )
    theta = left.outputs.new_empty(left.n * left.k, right.n * right.k)
    step, scratch = _tile(left, right, memory), _Scratch(left.outputs)
    starts = range(0, left.n, step)
    total = sum(len(range(i if symmetric else 0, right.n, step)) for i in starts)
    bar = tqdm(total=total, desc="kernel", delay=2, leave=False, disable=not progress)
    for i in starts:
        mine = left.factors(i, min(i + step, left.n))
        for j in range(i if symmetric else 0, right.n, step):
            theirs = mine if symmetric and i == j else right.factors(j, min(j + step, right.n))
            rows = slice(i * left.k, min(i + step, left.n) * left.k)
            columns = slice(j * right.k, min(j + step, right.n) * right.k)
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            tile = _product(mine, theirs, scratch.take("tile", *shape), scratch)
            if symmetric and i == j:
                tile = (tile + tile.T) / 2
            elif symmetric:
                theta[columns, rows] = scratch.take("mirror", *shape[::-1]).copy_(tile.T)
            theta[rows, columns] = tile
            bar.update()
    bar.close()
    return theta


class _Scratch:
    """Buffers that all tiles share: fresh memory costs more than the arithmetic on it."""

    def __init__(self, like: Tensor):
        self._like, self._held = like, {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Contiguous memory of a shape, what it held is lost."""
        size = shape[0] * shape[1]
        if name not in self._held or len(self._held[name]) < size:
            self._held[name] = self._like.new_empty(size)
        return self._held[name][:size].view(shape)


def _tile(left: Jacobian, right: Jacobian, memory: int) -> int:
    """Samples per tile: a tile of a few hundred rows stays in the cache; explicit rows amortise over larger tiles."""
    positions = any(g.ndim > 3 for _, g in left._uses) or bool(left._rows)
    k, item = max(left.k, right.k), left.outputs.element_size()
    rows = 2048 if positions else 640
    if left.outputs.device.type != "cpu":  # as many as keep a GPU busy
        rows = max(rows, min(4096, int((memory / (4 * item)) ** 0.5)))
    most = rows // k
    if positions and left.n:
        numbers = memory // (4 * k * item)
        most = min([most, *(_samples(factor, numbers, left) for factor in left.factors(0, 1))])
    return max(1, most)


def _samples(factor: Factor, numbers: int, jac: Jacobian) -> int:
    """Samples whose rows of a layer, as a product forms them, are about so many numbers."""
    if isinstance(factor, Rows):
        return numbers // max(1, factor.rows[0, 0].numel())
    (s, o), table = factor.g.shape[2:], sum(jac._shapes[name].numel() for name in factor.names.values())
    if isinstance(factor, Index):  # rows of the tokens that two tiles hold, of the whole table at most
        return max(numbers // max(1, table), math.isqrt(numbers // max(1, 2 * s * o)))
    return numbers // max(1, o * factor.width) if s > 1 else numbers


def _product(mine: list[Factor], theirs: list[Factor], tile: Tensor, scratch: _Scratch) -> Tensor:
    """Sum of the layers' Gram blocks, written into ``tile``; products of a serve all pairs of outputs at once."""
    fresh = True
    explicit: list[tuple[Tensor, Tensor]] = []
    fused: list[tuple[Outer, Outer]] = []
    in_place = tile.device.type == "cpu" and ntk_gram_sum.op.named() != "triton"  # nothing there fuses the layers
    for one, two in zip(mine, theirs, strict=True):
        if isinstance(one, Rows):
            explicit.append((one.rows.flatten(0, 1), two.rows.flatten(0, 1)))
            continue
        if isinstance(one, Index):
            block = _index_gram(one, two)
        elif not in_place:
            fused.append((one, two))
            continue
        elif one.g.shape[2] == 1 == two.g.shape[2]:
            (b, k, _, o), (c, m, _, _) = one.g.shape, two.g.shape
            inner = one.a[:, 0] @ two.a[:, 0].T
            inner = (inner + 1 if "bias" in one.names else inner).repeat_interleave(m, 1)[:, None]
            outer = scratch.take("outer", *tile.shape)
            torch.mm(one.g.reshape(b * k, o), two.g.reshape(c * m, o).T, out=outer)
            if fresh:
                torch.mul(outer.view(b, k, c * m), inner, out=tile.view(b, k, c * m))
            else:
                tile.view(b, k, c * m).addcmul_(outer.view(b, k, c * m), inner)
            fresh = False
            continue
        elif by_rows(one, two):
            block = _rows_gram(one, two)
        else:
            block = ntk_gram(one.augmented(), one.g.contiguous(), two.augmented(), two.g.contiguous())
        tile = tile.copy_(block) if fresh else tile.add_(block)
        fresh = False
    if fused:
        a1, g1, a2, g2 = map(list, zip(*((one.a, one.g, two.a, two.g) for one, two in fused), strict=True))
        block = ntk_gram_sum(a1, g1, a2, g2, ["bias" in one.names for one, _ in fused])
        tile, fresh = block if fresh else tile.add_(block), False
    if fresh:
        tile.zero_()
    if explicit:
        tile += long_product(torch.cat([a for a, _ in explicit], 1), torch.cat([b for _, b in explicit], 1))
    return tile


def _rows_gram(one: Outer, two: Outer) -> Tensor:
    """Gram block [b k, c m] of a layer from its rows."""
    rows = one.rows()
    block = long_product(rows, rows if one is two else two.rows())
    if "bias" in one.names:
        left, right = (x.g.sum(2, dtype=rows.dtype).flatten(0, 1) for x in (one, two))
        block.addmm_(left, right.T)
    return block


def by_rows(one: Outer, two: Outer | None = None) -> bool:
    """Whether the kernel of a layer, with itself or another, takes fewer operations by rows than by positions."""
    return rows_are_fewer(one.g, (two or one).g, one.width)


def layer_gram(one: Outer, two: Outer) -> Tensor:
    """Gram block [b k, c m] of a layer."""
    if one.g.shape[2] > 1 or two.g.shape[2] > 1:
        return ntk_gram(one.augmented(), one.g.contiguous(), two.augmented(), two.g.contiguous())
    (b, k, _, o), (c, m, _, _) = one.g.shape, two.g.shape
    inner = one.a[:, 0] @ two.a[:, 0].T
    inner = (inner + 1 if "bias" in one.names else inner).repeat_interleave(m, 1)[:, None]
    return ((one.g.reshape(b * k, o) @ two.g.reshape(c * m, o).T).view(b, k, c * m) * inner).view(b * k, c * m)


def _index_gram(one: Index, two: Index) -> Tensor:
    """sum over positions with equal tokens of g g'^T: only tokens that the right side holds take part."""
    (b, k, _, _), (c, m, t, o) = one.g.shape, two.g.shape
    tokens, place = torch.unique(two.token, return_inverse=True)
    index = place.view(c, 1, t, 1).expand(-1, m, -1, o)
    rows = two.g.new_zeros(c, m, len(tokens), o).scatter_add_(2, index, two.g)
    held = torch.searchsorted(tokens, one.token.contiguous()).clamp_max(len(tokens) - 1)
    held = torch.where((one.token >= 0) & (tokens[held] == one.token), held, -1)
    return token_jvp(held, one.g, rows.flatten(0, 1)).view(b * k, c * m)
