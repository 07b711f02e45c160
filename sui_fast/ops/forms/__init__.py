"""Quadratic forms of many vectors with one factor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._errors import ArgumentError, complaint
from .._op import op

_STRIPS, _LEAST_STRIP = 4, 64  # few enough to be products of full speed


def _examples(device):
    rng = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randn(*shape, generator=rng, dtype=torch.float64).to(device) for shape in shapes)
        for shapes in (((5, 7), (4, 7)), ((13, 13), (29, 13)))
    ]


def check_triangular(c: Tensor, _: Tensor | None = None) -> None:
    """Raise where c [p, r] has more rows than columns."""
    if c.shape[0] > c.shape[1]:
        got, todo = f"shape {list(c.shape)}", "Take the factor of a QR decomposition."
        raise ArgumentError(complaint("c, upper triangular", "at most as many rows as columns", got, todo))


@op(
    shapes={"c": "p r", "x": "n r"},
    result="n",
    examples=_examples,
    dtypes={"c": (torch.float64,), "x": (torch.float64,)},
    check=check_triangular,
)
def triangular_sqnorm(c: Tensor, x: Tensor) -> Tensor:
    """Squared length of an upper triangular factor times each of many vectors.

    ::

        result[i] = sum_a (sum_{l >= a} c[a, l] x[i, l])^2

    Args:
        c: factor [p, r], p <= r; what lies below its diagonal counts as zero. x: vectors [n, r]. Both float64.
    Returns:
        [n] float64.
    Raises:
        ArgumentError: shapes, dtypes or devices that disagree; p > r.
    Source: docs/math.md, section 3.
    """
    total = x.new_zeros(len(x))
    step = max(_LEAST_STRIP, -(-len(c) // _STRIPS))
    for begin in range(0, len(c), step):  # a strip needs x from its first column on
        strip = c[begin : begin + step, begin:].triu()
        total = total + (x[:, begin:] @ strip.T).square().sum(1)
    return total


def _product_examples(device):
    rng = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(*shape, generator=rng, dtype=torch.float64).to(device) for shape in shapes)
        for shapes in (((3, 29, 5), (3, 5, 31), (29, 31)), ((2, 4, 7), (2, 7, 9), (4, 9)))
    ]


@op(
    shapes={"a": "b t v", "m": "b v p", "base": "t p"},
    result="b t",
    examples=_product_examples,
    dtypes={"a": (torch.float64,), "m": (torch.float64,), "base": (torch.float64,)},
)
def product_sqnorm(a: Tensor, m: Tensor, base: Tensor) -> Tensor:
    """Squared length of every row of many products.

    ::

        result[b, t] = sum_p (base[t, p] + sum_v a[b, t, v] m[b, v, p])^2

    Args:
        a: left factors [b, t, v]. m: right factors [b, v, p]. base: what is added to each product [t, p]. All float64.
    Returns:
        [b, t] float64.
    Raises:
        ArgumentError: shapes, dtypes or devices that disagree.
    Source: docs/math.md, section 6.
    """
    return torch.baddbmm(base, a, m).square().sum(2)
