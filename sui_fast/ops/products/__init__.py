"""Products of a layer's Jacobian with tangents and cotangents."""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import op
from .._register import wide_dtype


def _examples(right: str):
    def make(device):
        rng = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng).to(device)

        last = {"tangents": (3, 4, 6), "cotangents": (5, 2, 3)}[right]
        return [(draw(5, 7, 6), draw(5, 2, 7, 4), draw(*last)), (draw(5, 1, 6), draw(5, 2, 1, 4), draw(*last))]

    return make


@op(
    shapes={"a": "n s i", "g": "n k s o", "tangents": "r o i"},
    result="n k r",
    examples=_examples("tangents"),
)
def jvp(a: Tensor, g: Tensor, tangents: Tensor) -> Tensor:
    """Jacobian rows times tangents.

    ::

        result[n, k, r] = sum_s g[n, k, s]^T tangents[r] a[n, s]

    By the rows or by the positions, whichever are fewer.

    Args:
        a: layer inputs [n, s, i]. g: gradients of the outputs with respect to the layer's result [n, k, s, o].
        tangents: directions of the weight [r, o, i]. All of one floating dtype; half precision accumulates in float32.
    Returns:
        [n, k, r], float32 for half precision, else the dtype of the arguments.
    Raises:
        ArgumentError: shapes, dtypes or devices that disagree.
    Source: docs/math.md, section 9.
    """
    wide = wide_dtype(a.dtype)
    a, g, tangents = a.to(wide), g.to(wide), tangents.to(wide)
    (n, k, s, o), (r, _, i) = g.shape, tangents.shape
    if s > k and n * k * o * i > 0:  # the rows are fewer than the positions
        return _rows(a, g).flatten(0, 1).mm(tangents.reshape(r, o * i).T).reshape(n, k, r)
    moved = torch.einsum("nsi,roi->nsro", a, tangents)
    return torch.einsum("nkso,nsro->nkr", g, moved)


@op(
    shapes={"a": "n s i", "g": "n k s o", "cotangents": "n k r"},
    result="r o i",
    examples=_examples("cotangents"),
)
def vjp(a: Tensor, g: Tensor, cotangents: Tensor) -> Tensor:
    """Cotangents times Jacobian rows, the adjoint of ``jvp``.

    ::

        result[r] = sum_{n, k, s} cotangents[n, k, r] g[n, k, s] a[n, s]^T

    Args:
        a: layer inputs [n, s, i]. g: output gradients [n, k, s, o]. cotangents: [n, k, r].
    Returns:
        [r, o, i], float32 for half precision, else the dtype of the arguments.
    Raises:
        ArgumentError: shapes, dtypes or devices that disagree.
    Source: docs/math.md, section 9.
    """
    wide = wide_dtype(a.dtype)
    a, g, cotangents = a.to(wide), g.to(wide), cotangents.to(wide)
    (n, k, s, o), i, r = g.shape, a.shape[2], cotangents.shape[2]
    if s > k and n * k * o * i > 0:
        return cotangents.reshape(n * k, r).T.mm(_rows(a, g).flatten(0, 1)).reshape(r, o, i)
    pulled = torch.einsum("nkr,nkso->rons", cotangents, g)
    return torch.einsum("rons,nsi->roi", pulled, a)


def _rows(a: Tensor, g: Tensor) -> Tensor:
    """sum_s g a^T as rows [n, k, o i]."""
    n, k, s, o = g.shape
    return (g.transpose(2, 3).reshape(n, k * o, s) @ a).reshape(n, k, o * a.shape[2])
