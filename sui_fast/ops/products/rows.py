"""Explicit rows into one reused buffer: the C++ writer where it is built, one call for all pieces of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._op import named_backend

try:
    from ... import _cpu
except ImportError:  # not built: PyTorch writes
    _cpu = None

_TYPES = {torch.float32: "float32", torch.float64: "float64"}


@dataclass
class Piece:
    """Columns of the rows that one parameter fills: g a^T of one position, or g itself where a is None."""

    column: int
    g: Tensor  # [n, k, o]
    a: Tensor | None = None  # [n, i]


def row_writer(pieces: list[Piece], out: Tensor) -> Callable[[int], None]:
    """A function of b that writes the rows of samples b m, b m + 1, ... into out [m, k, d], as far as there are any.

    Args:
        pieces: what to write, all of the dtype of out. out: columns adjacent, rows equally far apart.
    """
    plain = out.is_cpu and out.dtype in _TYPES and all(p.g.dtype == out.dtype for p in pieces)
    dense = out.stride(2) == 1 and (len(out) == 1 or out.stride(0) == out.shape[1] * out.stride(1))
    if _cpu is None or not plain or not dense or named_backend() not in (None, "cpu"):
        return _reference(pieces, out)
    held = [(p.g.contiguous(), None if p.a is None else p.a.contiguous(), p.column) for p in pieces]
    table = torch.tensor(
        [
            [g.data_ptr(), 0 if a is None else a.data_ptr(), g.shape[2], 1 if a is None else a.shape[1], column]
            for g, a, column in held
        ],
        dtype=torch.int64,
    ).reshape(-1, 5)
    call, count, k, pitch = getattr(_cpu, f"write_rows_{_TYPES[out.dtype]}"), len(held), out.shape[1], out.stride(1)
    address, target, keep = table.data_ptr(), out.data_ptr(), (held, table, out)

    step, total = len(out), len(held[0][0]) if held else 0

    def write(number: int) -> None:
        assert keep  # the addresses live as long as this function
        first = number * step
        call(address, count, first, min(step, total - first), k, target, pitch)

    return write


def _reference(pieces: list[Piece], out: Tensor) -> Callable[[int], None]:
    step, parts = len(out), []
    for piece in pieces:
        o, i = piece.g.shape[2], 1 if piece.a is None else piece.a.shape[1]
        target = out[:, :, piece.column : piece.column + o * i].unflatten(2, (o, i))
        right = piece.g.new_ones(len(piece.g), 1) if piece.a is None else piece.a
        parts.append((target, piece.g[..., None].split(step), right[:, None, None].split(step)))

    def write(number: int) -> None:
        for target, g, a in parts:
            torch.mul(g[number], a[number], out=target[: len(g[number])])

    return write
