"""Sketches: Jacobian rows of a layer times a fixed random matrix, without the matrix and mostly without the rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._errors import ArgumentError, complaint
from .._op import op
from .._register import wide_dtype
from ._random import bucket_and_sign, signs, steps

KINDS = ("tensor", "sjlt", "rademacher", "two_sided")
ROUTES = ("auto", "fft", "scatter")
_ELEMENTS = 1 << 24  # of one intermediate


def _examples(device):
    rng = torch.Generator().manual_seed(0)
    a, g = torch.randn(3, 4, 6, generator=rng).to(device), torch.randn(3, 2, 4, 5, generator=rng).to(device)
    many = torch.randn(2, 17, 6, generator=rng).to(device), torch.randn(2, 2, 17, 5, generator=rng).to(device)
    return [*((a, g, 8, 1, 2, kind, "auto") for kind in KINDS), (*many, 8, 1, 2, "two_sided", "auto")]


def _check(a, g, rank, seed, stream, kind, route) -> None:
    if rank < 1:
        raise ArgumentError(complaint("rank of sketch", "a whole number >= 1", rank, "Pass the features per row."))
    if kind not in KINDS:
        raise ArgumentError(complaint("kind of sketch", f"one of {', '.join(KINDS)}", repr(kind), "Choose one."))
    if route not in ROUTES:
        raise ArgumentError(complaint("route of sketch", f"one of {', '.join(ROUTES)}", repr(route), "Choose one."))


@op(shapes={"a": "n s i", "g": "n k s o"}, result="n k rank", examples=_examples, check=_check)
def sketch(
    a: Tensor, g: Tensor, rank: int, seed: int, stream: int, kind: str = "tensor", route: str = "auto"
) -> Tensor:
    """Rows sum_s g a^T times a random matrix P [o * i, rank] that depends on (seed, stream) alone; E<Px, Py> = <x, y>.

    ::

        tensor      bucket (h1(i) + h2(o)) mod rank, sign s1(i) s2(o): a count sketch that factors (Pham & Pagh 2013);
                    the shorter side takes places in turn, the other one at random
                    fft:     irfft(sum_s rfft(CS1 a_s) rfft(CS2 g_s))       the [o, i] row never exists
                    scatter: the row is formed and added bucket by bucket   the same numbers
        sjlt        one signed bucket per entry of the row                  (Kane & Nelson 2014)
        rademacher  dense signs / sqrt(rank)
        two_sided   (Pg g)(Pa a)^T with signs on both sides: cheapest and least faithful

    Args:
        a: layer inputs [n, s, i]. g: output gradients [n, k, s, o]. rank: features.
        seed, stream: of the random matrix; one stream for each layer.
        kind: see above. route: of the tensor sketch, "fft", "scatter" or "auto" (fewest operations).
    Returns:
        [n, k, rank], float32 for half precision, else the dtype of the arguments.
    Raises:
        ArgumentError: unknown kind or route, rank < 1, shapes or dtypes that disagree.
    Source: docs/math.md, section 10.
    """
    wide = wide_dtype(a.dtype)
    a, g = a.to(wide), g.to(wide)
    if a.numel() == 0 or g.numel() == 0:
        return a.new_zeros(*g.shape[:2], rank)
    if kind == "tensor":
        return _tensor(a, g, rank, seed, stream, route)
    if kind == "two_sided":
        return _two_sided(a, g, rank, seed, stream)
    project = _bucket_rows if kind == "sjlt" else _sign_rows
    return _by_rows(a, g, lambda rows: project(rows, rank, seed, stream))


def fft_is_cheaper(s: int, i: int, o: int, k: int, rank: int) -> bool:
    """Whether the FFT route of the tensor sketch needs fewer operations per sample than the scatter route."""
    transform = 5 * rank * max(math.log2(rank), 1.0)
    return s * (i + k * o + (1 + k) * transform + 6 * k * rank) < k * (2.0 * s * i * o + 4.0 * i * o)


def _tensor(a: Tensor, g: Tensor, rank: int, seed: int, stream: int, route: str = "auto", ones: bool = False) -> Tensor:
    """ones: one more input of ones, the bias."""
    (n, k, s, o), (step_a, step_g) = g.shape, steps(a.shape[2], g.shape[3], rank)
    a = torch.cat([a, a.new_ones(n, s, 1)], 2) if ones else a
    i = a.shape[2]
    place_a, sign_a = bucket_and_sign(i, rank, 0, stream, seed, a.device, a.dtype, step_a)
    place_g, sign_g = bucket_and_sign(o, rank, 1, stream, seed, a.device, a.dtype, step_g)
    if route == "scatter" or route == "auto" and not fft_is_cheaper(s, i, o, k, rank):
        place = ((place_g[:, None] + place_a) % rank).reshape(-1)
        sign = (sign_g[:, None] * sign_a).reshape(-1)
        return _by_rows(a, g, lambda rows: _scatter(rows * sign, place, rank))
    step = max(1, _ELEMENTS // max(1, (k + 1) * s * rank))
    parts = []
    for begin in range(0, n, step):
        left = torch.fft.rfft(_scatter(a[begin : begin + step] * sign_a, place_a, rank))
        right = torch.fft.rfft(_scatter(g[begin : begin + step] * sign_g, place_g, rank))
        parts.append(torch.fft.irfft((left[:, None] * right).sum(2), n=rank))
    return torch.cat(parts) if parts else a.new_zeros(0, k, rank)


def _two_sided(a: Tensor, g: Tensor, rank: int, seed: int, stream: int) -> Tensor:
    side = max(d for d in range(1, math.isqrt(rank) + 1) if rank % d == 0)
    left = g @ signs(g.shape[3], rank // side, 1, stream, seed, g.device, g.dtype)
    right = a @ signs(a.shape[2], side, 0, stream, seed, a.device, a.dtype)
    return torch.einsum("nksx,nsy->nkxy", left, right).flatten(2) / math.sqrt(rank)


def _by_rows(a: Tensor, g: Tensor, project) -> Tensor:
    """Form the rows [n, k, o i] a few samples at a time and project them."""
    (n, k, s, o), i = g.shape, a.shape[2]
    step = max(1, _ELEMENTS // max(1, k * o * i))
    rows = (
        (g[b : b + step].transpose(2, 3).reshape(-1, k * o, s) @ a[b : b + step]).reshape(-1, k, o * i)
        for b in range(0, max(n, 1), step)
    )
    return torch.cat([project(part) for part in rows])


def _scatter(x: Tensor, place: Tensor, rank: int) -> Tensor:
    return x.new_zeros(*x.shape[:-1], rank).index_add(-1, place, x)


def _bucket_rows(rows: Tensor, rank: int, seed: int, stream: int) -> Tensor:
    place, sign = bucket_and_sign(rows.shape[2], rank, 2, stream, seed, rows.device, rows.dtype)
    return _scatter(rows * sign, place, rank)


def _sign_rows(rows: Tensor, rank: int, seed: int, stream: int) -> Tensor:
    step = max(1, _ELEMENTS // rank)  # entries whose signs exist at a time
    parts = [
        part @ signs(part.shape[2], rank, 3, stream, seed, rows.device, rows.dtype, begin)
        for begin, part in zip(range(0, rows.shape[2], step), rows.split(step, 2), strict=True)
    ]
    return sum(parts[1:], parts[0]) / math.sqrt(rank)
