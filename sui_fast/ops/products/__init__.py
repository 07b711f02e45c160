"""Products of a layer's Jacobian with tangents and cotangents."""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import op
from .._register import wide_dtype

_ELEMENTS = 1 << 21  # of one intermediate, at least


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

    By the rows or by the positions, whichever takes fewer operations, some samples at a time.

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
    (n, k, s, o), (r, _, i) = g.shape, tangents.shape
    if 0 in (n, k, s, o, i, r):
        return a.new_zeros(n, k, r, dtype=wide)
    tangents, (by_rows, each) = tangents.to(wide), _way(k, s, i, o, r)
    right = tangents.reshape(r, o * i).T if by_rows else tangents.reshape(r * o, i).T
    parts = []
    for part in _parts(n, _step(each, a.numel(), g.numel(), r * o * i)):
        x, y = a[part].to(wide), g[part].to(wide)
        if by_rows:
            parts.append((_rows(x, y).flatten(0, 1) @ right).unflatten(0, (-1, k)))
        else:  # [b, s, k, o] times [b, s, o, r]
            moved = (x.flatten(0, 1) @ right).reshape(-1, s, r, o)
            parts.append((y.transpose(1, 2) @ moved.transpose(2, 3)).sum(1))
    return torch.cat(parts)


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
    (n, k, s, o), i, r = g.shape, a.shape[2], cotangents.shape[2]
    if 0 in (n, k, s, o, i, r):
        return a.new_zeros(r, o, i, dtype=wide)
    cotangents, (by_rows, each) = cotangents.to(wide).transpose(1, 2), _way(k, s, i, o, r)
    total = None
    for part in _parts(n, _step(each, a.numel(), g.numel(), r * o * i)):
        found = _pulled(a[part].to(wide), g[part].to(wide), cotangents[part], by_rows)
        if total is None:
            total = found
        else:
            total += found
    return total.reshape(r, o, i)


def _pulled(x: Tensor, y: Tensor, c: Tensor, by_rows: bool) -> Tensor:
    """Of some samples, c [b, r, k]; what it takes on the way is gone when the next are looked at."""
    r = c.shape[1]
    if by_rows:
        return c.transpose(0, 1).reshape(r, -1) @ _rows(x, y).flatten(0, 1)
    # c g [b, s, r, o], then [r o, b s] times a
    pulled = c[:, None] * y.transpose(1, 2) if c.shape[2] == 1 else c[:, None] @ y.transpose(1, 2)
    return pulled.reshape(-1, r * y.shape[3]).T @ x.flatten(0, 1)


def vjp_room(n: int, k: int, s: int, i: int, o: int, r: int) -> int:
    """Numbers that ``vjp`` holds at a time beside its arguments, at most; sizes as there."""
    (by_rows, each), weights = _way(k, s, i, o, r), r * o * i
    step = _step(each, n * s * i, n * k * s * o, weights)
    copies = k * max(s * o, r) if by_rows and k > 1 else 0
    return min(n, step) * (each + copies) + weights * (
        1 + (step < n)
    )  # a part, its result, and the sum of those before


def _way(k: int, s: int, i: int, o: int, r: int) -> tuple[bool, int]:
    """Whether the rows [o, i] of a sample take fewer operations than products of its positions; numbers of the way."""
    by_rows = k * i * (s + r) < s * r * (i + k)
    return by_rows, k * o * i if by_rows else s * o * r


def _step(each: int, *held: int) -> int:
    """Samples at a time, so that an intermediate of ``each`` a sample is no larger than what the call holds anyway."""
    return max(1, max(_ELEMENTS, *held) // each)


def _parts(n: int, step: int) -> list[slice]:
    return [slice(begin, begin + step) for begin in range(0, n, step)]


def _rows(a: Tensor, g: Tensor) -> Tensor:
    """sum_s g a^T as rows [n, k, o i]."""
    n, k, s, o = g.shape
    return (g.transpose(2, 3).reshape(n, k * o, s) @ a).reshape(n, k, o * a.shape[2])
