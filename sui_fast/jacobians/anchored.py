"""Coordinates along some directions, sketch and own blocks of a batch; the rows of a layer are formed once for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.sketching.sums import TensorSums
from .gram import layer_gram
from .jacobian import Jacobian, own_block
from .layers import Factor, Index, Outer, Rows
from .streams import add_factor, layer_order

_ENTRIES = 1 << 24  # of formed rows at a time


@dataclass
class Anchors:
    """Directions B [q, d] = chosen^T J(pool) of weight space, for each layer in the form that costs least.

    Attributes:
        chosen: [p k, q], float64. rows: B [q, d], of the layers that want it; None where none does.
        near: factors of the pool, portion by portion, by ``layer_order``; those of layers which take their coordinates
            from the kernel with the pool, else None. Empty where none does.
    """

    chosen: Tensor
    rows: Tensor | None
    near: list[list[Factor | None]]


def make_anchors(pool: Jacobian, chosen: Tensor, step: int | None = None, shared: bool = True) -> Anchors:
    """Anchors from the Jacobian of a pool and [p k, q].

    Args:
        step: samples whose factors are float64 at a time, as is then the sum that B is; its dtype is the pool's.
        shared: as in ``goes_by_kernel``.
    """
    one = sorted(pool.select(range(1)).factors(), key=layer_order)
    goes = [goes_by_kernel(factor, pool.n, chosen.shape[1], shared) for factor in one]
    take = lambda jac, which: [  # noqa: E731
        factor if by_kernel == which else None
        for factor, by_kernel in zip(sorted(jac.factors(), key=layer_order), goes, strict=True)
    ]
    rows, near = None, []
    step = None if all(goes) else step
    for begin in range(0, pool.n, step or pool.n):
        part = pool if step is None else pool.select(range(begin, min(begin + step, pool.n)))
        near.append(take(part, True) if any(goes) else [None] * len(goes))
        if not all(goes):
            part = part if step is None else part.wide()
            rows = part.outputs.new_zeros(chosen.shape[1], pool.shape[1]) if rows is None else rows
            part.add_vjp(chosen[begin * pool.k : (begin + part.n) * pool.k], rows, [x for x in take(part, False) if x])
    return Anchors(chosen, None if rows is None else rows.to(pool.dtype), near)


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
    return factor.width if isinstance(factor, Outer) else factor.g.shape[3]


def goes_by_kernel(factor: Factor, pool: int, directions: int, shared: bool = True) -> bool:
    """Whether coordinates of a layer cost less through its kernel with the pool than through the directions.

    shared: the rows of a layer with positions are formed for a sketch anyway, and the pool is there for it alone.
    """
    if not isinstance(factor, Outer) or shared and factor.g.shape[2] > 1:
        return False
    (_, k, s, o), i = factor.g.shape, factor.width
    formed = k * o * i * (directions + (s if s > 1 else 0))
    return pool * s * s * (i + k * k * o) < formed * (1 if shared else 2)


def project(
    jac: Jacobian, anchors: Anchors, rank: int, seed: int, kind: str | None, own: bool
) -> tuple[Tensor | None, Tensor, Tensor | None, list]:
    """Sketch [n, k, rank] of the rows, coordinates [n, k, q] along the anchors, and own blocks [n, k, k] where wanted.

    With them the layers in the order of their streams, as ``sketch_of_uses``. Without a kind there is no sketch.
    """
    with torch.autocast(jac.device.type, enabled=False):
        factors = sorted(jac.factors(), key=layer_order)
        sums = TensorSums(jac.n, jac.k, rank, seed, jac.outputs) if kind == "tensor" else None
        along = jac.outputs.new_zeros(jac.n, jac.k, anchors.chosen.shape[1])
        blocks = jac.outputs.new_zeros(jac.n, jac.k, jac.k) if own else None
        kernel = None
        for stream, factor in enumerate(factors):
            near = [factors[stream] for factors in anchors.near if factors[stream] is not None]
            if not near and isinstance(factor, Outer) and factor.g.shape[2] > 1:
                _form(jac, factor, anchors.rows, stream, sums, along, blocks)
                continue
            if near:
                found = torch.cat([layer_gram(factor, other) for other in near], 1)
                kernel = found if kernel is None else kernel.add_(found)
            else:
                along += jac.along(anchors.rows, factor)
            if sums is not None:
                add_factor(sums, factor, stream, jac._shapes)
            if blocks is not None:
                blocks += own_block(factor)
        if kernel is not None:
            along += (kernel.to(torch.float64) @ anchors.chosen).view(along.shape).to(along)
        sketched = jac.sketch(rank, seed, kind) if kind and sums is None else sums and sums.total()
        return sketched, along, blocks, list(map(layer_order, factors))


def _form(jac, factor: Outer, directions: Tensor, stream: int, sums, along: Tensor, blocks: Tensor | None) -> None:
    """Rows of a layer, some samples at a time, to all that is made of them."""
    (n, k, _, o), i = factor.g.shape, factor.width
    weight, bias = jac.part_of(directions, factor, "weight").flatten(1), None
    if "bias" in factor.names:
        bias = factor.g.sum(2)
        along += bias @ jac.part_of(directions, factor, "bias").flatten(1).T
        if blocks is not None:
            blocks += own_block(Rows({}, bias))
    step = max(1, min(n, _ENTRIES // (k * o * i)))
    buffer = factor.g.new_empty(step, k * o, i)
    for begin in range(0, n, step):
        part = slice(begin, begin + step)
        rows = factor.some(part).rows(buffer[: n - begin]).view(-1, k, o, i)
        flat = rows.flatten(2)
        along[part] += flat @ weight.T
        if blocks is not None:
            blocks[part] += own_block(Rows({}, flat))
        if sums is not None:
            sums.formed(rows, begin, stream, None if bias is None else bias[part])
