"""The NTK tile by tile from per-layer factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._errors import ArgumentError, complaint
from ..ops import ntk_gram
from .layers import Factor, Index, Rows

if TYPE_CHECKING:
    from .jacobian import Jacobian


def gram(left: Jacobian, right: Jacobian | None, *, memory: int, progress: bool) -> Tensor:
    """Theta [N, N']: the upper triangle of tiles where ``right`` is None, mirrored; see ``Jacobian.gram``."""
    symmetric = right is None
    right = left if right is None else right
    if left._shapes != right._shapes or left.dtype != right.dtype:
        raise ArgumentError(complaint("other", "a Jacobian of the same parameters and dtype", repr(right),
                                      "Build both from one model with the same params= and dtype=."))
    theta = left.outputs.new_empty(left.n * left.k, right.n * right.k)
    step = _tile(left, right, memory)
    starts = range(0, left.n, step)
    bar = tqdm(total=sum(len(range(i if symmetric else 0, right.n, step)) for i in starts), desc="kernel", delay=2,
               leave=False, disable=not progress)
    for i in starts:
        mine = left.factors(i, min(i + step, left.n))
        for j in range(i if symmetric else 0, right.n, step):
            theirs = mine if symmetric and i == j else right.factors(j, min(j + step, right.n))
            tile = theta[i * left.k : (i + step) * left.k, j * right.k : (j + step) * right.k]
            _fill(tile, mine, theirs)
            if symmetric and i == j:
                tile.copy_((tile + tile.T) / 2)
            elif symmetric:
                theta[j * left.k : (j + step) * left.k, i * left.k : (i + step) * left.k] = tile.T
            bar.update()
    bar.close()
    return theta


def _tile(left: Jacobian, right: Jacobian, memory: int) -> int:
    """Samples per tile: a tile of a few hundred rows stays in the cache; explicit rows stay within the memory."""
    widest = max([1, *(shape.numel() for shape in left._shapes.values())])
    per_sample = left.k * widest * left.outputs.element_size() * 3
    return int(max(1, min(max(8, 768 // max(left.k, right.k)), memory // max(1, 2 * per_sample))))


def _fill(tile: Tensor, mine: list[Factor], theirs: list[Factor]) -> None:
    tile.zero_()
    explicit: list[tuple[Tensor, Tensor]] = []
    for one, two in zip(mine, theirs, strict=True):
        if isinstance(one, Rows):
            explicit.append((one.rows.flatten(0, 1), two.rows.flatten(0, 1)))
        elif isinstance(one, Index):
            tile += _index_gram(one, two)
        elif one.a.shape[1] == 1:
            (b, k, _, o), (c, l) = one.g.shape, two.g.shape[:2]
            inner = one.a[:, 0] @ two.a[:, 0].T
            if "bias" in one.names:
                inner += 1
            outer = one.g.reshape(b * k, o) @ two.g.reshape(c * l, o).T
            tile.view(tile.shape).unflatten(0, (b, k)).unflatten(2, (c, l)).addcmul_(
                outer.view(b, k, c, l), inner[:, None, :, None])
        else:
            tile += ntk_gram(one.augmented(), one.g.contiguous(), two.augmented(), two.g.contiguous())
    if explicit:
        tile.addmm_(torch.cat([a for a, _ in explicit], 1), torch.cat([b for _, b in explicit], 1).T)


def _index_gram(one: Index, two: Index) -> Tensor:
    """sum over positions with equal tokens of g g'^T: only tokens that both sides hold take part."""
    (b, k, s, o), (c, l, t, _) = one.g.shape, two.g.shape
    tokens, place = torch.unique(torch.cat([one.token.reshape(-1), two.token.reshape(-1)]), return_inverse=True)
    keep = (tokens >= 0).to(one.g.dtype)

    def rows(g: Tensor, where: Tensor, count: int, positions: int) -> Tensor:
        index = where.view(count, 1, positions, 1).expand(-1, g.shape[1], -1, o)
        summed = g.new_zeros(count, g.shape[1], len(tokens), o).scatter_add_(2, index, g)
        return (summed * keep[:, None]).flatten(2).flatten(0, 1)

    return rows(one.g, place[: b * s], b, s) @ rows(two.g, place[b * s :], c, t).T
