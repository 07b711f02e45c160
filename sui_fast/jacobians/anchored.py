"""Sketch, coordinates along some directions and own blocks of a batch; the rows of a layer are formed once for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.sketching.sums import TensorSums
from .gram import flat_gram
from .jacobian import Jacobian, own_block
from .layers import Factor, Index, Outer, Rows
from .streams import add_factor, layer_order

_ENTRIES = 1 << 24  # of formed rows at a time


@dataclass
class Anchors:
    """Directions B [q, d] = chosen^T J(pool) of weight space, for each layer in the form that costs least.

    Attributes:
        chosen: [p k, q], float64. rows: B [q, d], of the layers that want it; None where none does.
        near: factors of the pool, by ``layer_order``; those of layers which take their coordinates from the kernel with
            the pool, else None. Empty where none does.
    """

    chosen: Tensor
    rows: Tensor | None
    near: list[Factor | None]


def make_anchors(pool: Jacobian, chosen: Tensor) -> Anchors:
    """Anchors from the Jacobian of a pool and [p k, q]."""
    factors = sorted(pool.factors(), key=layer_order)
    near = [factor if goes_by_kernel(factor, pool.n, chosen.shape[1]) else None for factor in factors]
    formed = [factor for factor, other in zip(factors, near, strict=True) if other is None]
    return Anchors(chosen, pool.vjp(chosen.to(pool.dtype), formed) if formed else None, near)


def sketched_anchors(jac: Jacobian, rows: Tensor, rank: int, seed: int) -> Tensor:
    """Tensor sketch [q, rank] of directions [q, d], by the maps that ``project`` has for the layers of a Jacobian."""
    sums = TensorSums(len(rows), 1, rank, seed, jac.outputs)
    for stream, factor in enumerate(sorted(jac.select(range(1)).factors(), key=layer_order)):
        parts = {role: jac.part_of(rows, factor, role).reshape(len(rows), 1, -1) for role in factor.names}
        if isinstance(factor, Rows):
            sums.rows(parts["rows"], stream)
        else:
            sums.formed(parts["weight"].unflatten(2, (-1, _width(factor))), 0, stream, parts.get("bias"))
    return sums.total()[:, 0]


def _width(factor: Outer | Index) -> int:
    return factor.a.shape[2] if isinstance(factor, Outer) else factor.g.shape[3]


def goes_by_kernel(factor: Factor, pool: int, directions: int) -> bool:
    """Whether coordinates of a layer cost less through its kernel with the pool than through the directions."""
    if not isinstance(factor, Outer) or factor.a.shape[1] > 1:
        return False
    k, o, i = factor.g.shape[1], factor.g.shape[3], factor.a.shape[2]
    return pool * (i + k * k * o) < k * directions * i * o


def project(
    jac: Jacobian, anchors: Anchors, rank: int, seed: int, kind: str, own: bool
) -> tuple[Tensor, Tensor, Tensor | None, list]:
    """Sketch [n, k, rank] of the rows, coordinates [n, k, q] along the anchors, and own blocks [n, k, k] where wanted.

    With them the layers in the order of their streams, as ``sketch_of_uses``.
    """
    with torch.autocast(jac.device.type, enabled=False):
        factors = sorted(jac.factors(), key=layer_order)
        sums = TensorSums(jac.n, jac.k, rank, seed, jac.outputs) if kind == "tensor" else None
        along = jac.outputs.new_zeros(jac.n, jac.k, anchors.chosen.shape[1])
        blocks = jac.outputs.new_zeros(jac.n, jac.k, jac.k) if own else None
        kernel = None
        for stream, (factor, near) in enumerate(zip(factors, anchors.near or [None] * len(factors), strict=True)):
            if isinstance(factor, Outer) and factor.a.shape[1] > 1:
                _form(jac, factor, anchors.rows, stream, sums, along, blocks)
                continue
            if near is not None:
                found = flat_gram(factor, near)
                kernel = found if kernel is None else kernel.add_(found)
            else:
                along += jac.along(anchors.rows, factor)
            if sums is not None:
                add_factor(sums, factor, stream, jac._shapes)
            if blocks is not None:
                blocks += own_block(factor)
        if kernel is not None:
            along += (kernel.to(torch.float64) @ anchors.chosen).view(along.shape).to(along)
        sketched = jac.sketch(rank, seed, kind) if sums is None else sums.total()
        return sketched, along, blocks, list(map(layer_order, factors))


def _form(jac, factor: Outer, directions: Tensor, stream: int, sums, along: Tensor, blocks: Tensor | None) -> None:
    """Rows of a layer, some samples at a time, to all that is made of them."""
    (n, k, s, o), i = factor.g.shape, factor.a.shape[2]
    weight, bias = jac.part_of(directions, factor, "weight").flatten(1), None
    if "bias" in factor.names:
        bias = factor.g.sum(2)
        along += bias @ jac.part_of(directions, factor, "bias").flatten(1).T
        if blocks is not None:
            blocks += own_block(Rows({}, bias))
    turned = factor.g.transpose(2, 3).reshape(n, k * o, s)
    step = max(1, min(n, _ENTRIES // (k * o * i)))
    for begin in range(0, n, step):
        part = slice(begin, begin + step)
        rows = torch.bmm(turned[part], factor.a[part]).view(-1, k, o, i)
        flat = rows.flatten(2)
        along[part] += flat @ weight.T
        if blocks is not None:
            blocks[part] += own_block(Rows({}, flat))
        if sums is not None:
            sums.formed(rows, begin, stream, None if bias is None else bias[part])
