"""C++ kernels of the sketches (csrc/cpu/rows_kernels.cpp; the tensor sketch is in `_tensor_cpu.py`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._register import wide_dtype
from ._tensor_cpu import NAMES, add_fourier, add_scatter, call, fft_is_cheaper, finish, new_sums, ring_of

_BUFFER = 1 << 18  # numbers of one intermediate: they stay in the second cache


def sketch(
    a: Tensor, g: Tensor, rank: int, seed: int, stream: int, kind: str = "tensor", route: str = "auto"
) -> Tensor:
    """See the op of the same name."""
    a, g = a.detach(), g.detach()
    (n, k, _, _), wide = g.shape, wide_dtype(a.dtype)
    seed, stream = seed & 0xFFFFFFFFFFFFFFFF, stream & 0xFFFFFFFF
    if kind == "two_sided" and a.numel() and g.numel():
        return _two_sided(a, g, rank, seed, stream)
    out = torch.zeros(n, k, rank, dtype=wide)
    if out.numel() and a.numel() and g.numel():
        _KINDS[kind](a, g, out, seed, stream, route)
    return out


def refuse_sketch(
    a: Tensor, g: Tensor, rank: int, seed: int, stream: int, kind: str = "tensor", route: str = "auto"
) -> str | None:
    """Why this call is not for the kernel, or None."""
    if wide_dtype(a.dtype) not in NAMES:
        return f"the tensors are {a.dtype}; it takes float64, float32 and half precision"
    if rank >= 1 << 30:
        return f"rank {rank}; it takes at most 2^30"
    return None


# Tensor sketch --------------------------------------------------------------------------------------------------------
def _tensor(a: Tensor, g: Tensor, out: Tensor, seed: int, stream: int, route: str) -> None:
    (n, k, s, o), i, rank = g.shape, a.shape[2], out.shape[2]
    if route == "scatter" or route == "auto" and not fft_is_cheaper(n, s, i, o, k, rank):
        add_scatter(a, g, out, seed, stream, False)
    else:
        ring = ring_of(a, g, out)
        sums = new_sums(out, ring)
        add_fourier([(a, g, stream, False)], rank, sums, ring, seed)
        finish(sums, ring, out)


# Sketches of formed rows --------------------------------------------------------------------------------------------
def _row_tiles(a: Tensor, g: Tensor, dtype: torch.dtype, least: int):
    """(samples, first entry, rows [samples k, entries]) in tiles, at least ``least`` rows where there are as many."""
    (n, k, s, o), i = g.shape, a.shape[2]
    samples = min(n, max(1, -(-least // k)))
    part = max(1, min(o, 8 * _BUFFER // (samples * k * i)))
    for n0 in range(0, n, samples):
        x, y = a[n0 : n0 + samples].to(dtype), g[n0 : n0 + samples].to(dtype)
        for o0 in range(0, o, part):
            strip = y[..., o0 : o0 + part]
            if s == 1:
                rows = strip[:, :, 0, :, None] * x[:, :, None]
            else:
                rows = strip.transpose(2, 3).reshape(len(x), -1, s) @ x
            yield slice(n0, n0 + len(x)), o0 * i, rows.reshape(len(x) * k, -1)


def _sjlt(a: Tensor, g: Tensor, out: Tensor, seed: int, stream: int, route: str) -> None:
    (n, k, s, o), i, rank = g.shape, a.shape[2], out.shape[2]
    run = call("sjlt", out.dtype)

    def add(target: Tensor, first: int, rows: Tensor) -> None:
        rows, size = rows.contiguous(), rows.shape[1]
        run(2, stream, seed, rows.data_ptr(), len(rows), first, size, size, rank, target.data_ptr(), _threads())

    if s == 1 and i == 1 and g.dtype == out.dtype:  # rows as they are, scaled at the end
        add(out, 0, g.reshape(n * k, o))
        out *= a
        return
    for samples, first, rows in _row_tiles(a, g, out.dtype, 64):
        add(out[samples], first, rows)


def _rademacher(a: Tensor, g: Tensor, out: Tensor, seed: int, stream: int, route: str) -> None:
    rank = out.shape[2]
    size, step = 1 / math.sqrt(rank), max(1, _BUFFER // rank)
    table, run = out.new_empty(step, rank), call("signs", out.dtype)
    for samples, first, rows in _row_tiles(a, g, out.dtype, 256):
        target = out[samples].view(-1, rank)
        for begin in range(0, rows.shape[1], step):
            part = rows[:, begin : begin + step]
            run(3, stream, seed, first + begin, part.shape[1], rank, size, table.data_ptr())
            target.addmm_(part, table[: part.shape[1]])


def _two_sided(a: Tensor, g: Tensor, rank: int, seed: int, stream: int) -> Tensor:
    (n, k, s, o), i, dtype = g.shape, a.shape[2], wide_dtype(a.dtype)
    side = max(d for d in range(1, math.isqrt(rank) + 1) if rank % d == 0)
    left, right = torch.empty(o, rank // side, dtype=dtype), torch.empty(i, side, dtype=dtype)
    run = call("signs", dtype)
    run(1, stream, seed, 0, o, rank // side, 1 / math.sqrt(rank), left.data_ptr())
    run(0, stream, seed, 0, i, side, 1.0, right.data_ptr())
    y, x = _wide_product(g, left), _wide_product(a, right)  # [n, k, s, rank / side], [n, s, side]
    if s == 1:
        return (y.transpose(2, 3) * x[:, None]).view(n, k, rank)
    return torch.matmul(y.transpose(2, 3), x[:, None]).view(n, k, rank)


def _wide_product(x: Tensor, table: Tensor) -> Tensor:
    """x @ table, half precision widened a strip at a time."""
    if x.dtype == table.dtype:
        return x @ table
    step = max(1, 8 * _BUFFER // max(1, x[0].numel()))
    return torch.cat([part.to(table.dtype) @ table for part in x.split(step)])


def _threads() -> int:
    return torch.get_num_threads()


_KINDS = {"tensor": _tensor, "sjlt": _sjlt, "rademacher": _rademacher}
