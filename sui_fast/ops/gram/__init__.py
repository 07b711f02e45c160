"""Blocks of the neural tangent kernel: of one layer, and summed over the layers of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._errors import ArgumentError, complaint
from .._op import op
from .._register import wide_dtype

_ELEMENTS = 1 << 24  # of one intermediate of the s x s' form
_LONG = 1 << 14  # terms of one sum


def _examples(device):
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(device)

    return [
        (draw(5, 1, 6), draw(5, 2, 1, 4), draw(3, 1, 6), draw(3, 2, 1, 4)),
        (draw(5, 3, 17), draw(5, 2, 3, 9), draw(4, 2, 17), draw(4, 1, 2, 9)),
    ]


def _sum_examples(device):
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(device)

    sizes = (1, 1, 6, 4), (3, 2, 17, 9), (1, 1, 5, 2)  # positions of each side, i, o
    left = [draw(5, s, i) for s, _, i, _ in sizes], [draw(5, 2, s, o) for s, _, _, o in sizes]
    right = [draw(4, t, i) for _, t, i, _ in sizes], [draw(4, 1, t, o) for _, t, _, o in sizes]
    return [(*left, *right, [True, False, False])]


@op(
    shapes={"a1": "n1 s1 i", "g1": "n1 k1 s1 o", "a2": "n2 s2 i", "g2": "n2 k2 s2 o"},
    result="n1*k1 n2*k2",
    examples=_examples,
)
def ntk_gram(a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor) -> Tensor:
    """Gram matrix of the Jacobian rows of one layer.

    ::

        result[(n, k), (m, l)] = sum_{s, t} (a1[n, s] . a2[m, t]) (g1[n, k, s] . g2[m, l, t])

    One position: the product of the a, computed once for all pairs of outputs, times the product of the g. Several: the
    cheaper of the s x t products and of forming the [o, i] rows.

    Args:
        a1, a2: layer inputs [n1, s1, i], [n2, s2, i]. g1, g2: output gradients [n1, k1, s1, o], [n2, k2, s2, o].
    Returns:
        [n1 * k1, n2 * k2], float32 for half precision, else the dtype of the arguments.
    Raises:
        ArgumentError: shapes, dtypes or devices that disagree.
    Source: Novak et al. 2022, structured derivatives; docs/math.md, section 9.
    """
    return _gram(a1, g1, a2, g2)


def _check_sum(a1, g1, a2, g2, bias) -> None:
    if len(bias) != len(a1):
        raise ArgumentError(
            complaint("bias of ntk_gram_sum", f"{len(a1)} flags, one for each layer", len(bias), "Pass True or False.")
        )


@op(
    shapes={"a1": "n1 *s1 *i", "g1": "n1 k1 *s1 *o", "a2": "n2 *s2 *i", "g2": "n2 k2 *s2 *o"},
    result="n1*k1 n2*k2",
    examples=_sum_examples,
    check=_check_sum,
)
def ntk_gram_sum(a1: list[Tensor], g1: list[Tensor], a2: list[Tensor], g2: list[Tensor], bias: list[bool]) -> Tensor:
    """Gram matrix of the Jacobian rows of several layers: ``ntk_gram`` summed over them.

    ::

        result[(n, k), (m, l)] = sum_layers sum_{s, t} (a1[n, s] . a2[m, t] + bias) (g1[n, k, s] . g2[m, l, t])

    Args:
        a1, a2, g1, g2: as of ``ntk_gram``, one for each layer; positions and layer sizes may differ from layer to
            layer, samples and outputs may not.
        bias: for every layer whether one more input, of ones, is meant.
    Returns:
        [n1 * k1, n2 * k2], float32 for half precision, else the dtype of the arguments.
    Raises:
        ArgumentError: shapes, dtypes, devices or numbers of layers that disagree.
    Source: as ``ntk_gram``.
    """
    total = None
    for one, left, two, right, ones in zip(a1, g1, a2, g2, bias, strict=True):
        if ones:
            one, two = (torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2) for x in (one, two))
        block = _gram(one, left, two, right)
        total = block if total is None else total + block
    return total


def _gram(a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor) -> Tensor:
    wide = wide_dtype(a1.dtype)
    a1, g1, a2, g2 = (x.to(wide) for x in (a1, g1, a2, g2))
    (n1, k1, s1, o), (n2, k2, s2, _), i = g1.shape, g2.shape, a1.shape[2]
    if 0 in (s1, s2, i, o):
        return a1.new_zeros(n1 * k1, n2 * k2)
    if s1 == 1 and s2 == 1:
        outer = (g1.reshape(n1 * k1, o) @ g2.reshape(n2 * k2, o).T).reshape(n1, k1, n2, k2)
        inner = a1[:, 0] @ a2[:, 0].T
        return (outer * inner[:, None, :, None]).reshape(n1 * k1, n2 * k2)
    if rows_are_fewer(g1, g2, i):
        return long_product(rows_of(a1, g1), rows_of(a2, g2))
    step = max(1, _ELEMENTS // max(1, k1 * s1 * n2 * k2 * s2))
    parts = [_positions(a1[b : b + step], g1[b : b + step], a2, g2) for b in range(0, n1, step)]
    return torch.cat(parts) if parts else a1.new_zeros(0, n2 * k2)


def rows_are_fewer(g1: Tensor, g2: Tensor, i: int, faster: float = 1.0) -> bool:
    """Whether a product of the rows [o, i] takes fewer operations than products of positions that run ``faster``."""
    (_, k1, s1, o), (_, k2, s2, _) = g1.shape, g2.shape
    return s1 * s2 > 1 and faster * o * i <= s1 * s2 * (o + i / max(k1 * k2, 1) + 2)


def long_product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T, portion by portion of the columns: one sum of millions of terms loses two digits in float32."""
    total = left[:, :_LONG] @ right[:, :_LONG].T
    for begin in range(_LONG, left.shape[1], _LONG):
        total.addmm_(left[:, begin : begin + _LONG], right[:, begin : begin + _LONG].T)
    return total


def rows_of(a: Tensor, g: Tensor) -> Tensor:
    """sum_s g a^T as rows [n k, o i]."""
    n, k, s, o = g.shape
    return (g.transpose(2, 3).reshape(n, k * o, s) @ a).reshape(n * k, o * a.shape[2])


def _positions(a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor) -> Tensor:
    (n1, k1, s1, o), (n2, k2, s2, _) = g1.shape, g2.shape
    inner = (a1.reshape(n1 * s1, -1) @ a2.reshape(n2 * s2, -1).T).reshape(n1, 1, s1, n2, 1, s2)
    outer = (g1.reshape(n1 * k1 * s1, o) @ g2.reshape(n2 * k2 * s2, o).T).reshape(n1, k1, s1, n2, k2, s2)
    return (outer * inner).sum((2, 5)).reshape(n1 * k1, n2 * k2)
