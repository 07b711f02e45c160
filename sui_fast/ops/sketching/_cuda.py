"""CUDA kernels of the tensor sketch and of the SJLT (csrc/cuda/sketch.cu)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import _nvrtc
from .._register import wide_dtype
from ._random import bucket_and_sign

_THREADS = 256
_ROWS = 4  # of a block of threads in scatter_rows
_SHARED = 96 * 1024
_FORMED = 8  # positions from which a matrix product forms the rows, a strip at a time
_ELEMENTS = 1 << 26
_NAMES = {torch.float32: "float32", torch.float64: "float64"}


def sketch(
    a: Tensor, g: Tensor, rank: int, seed: int, stream: int, kind: str = "tensor", route: str = "auto"
) -> Tensor:
    """See the op of the same name."""
    wide = wide_dtype(a.dtype)
    a, g = a.detach().to(wide).contiguous(), g.detach().to(wide).contiguous()
    out = torch.zeros(*g.shape[:2], rank, dtype=wide, device=a.device)
    if out.numel() and a.numel() and g.numel():
        fft = kind == "tensor" and _takes_fft(rank, wide) and (route == "fft" or route == "auto" and _cheap_fft(a, g))
        tables = _tables(a, g, rank, seed, stream) if kind == "tensor" else (None,) * 4
        if fft:
            _by_fft(a, g, out, tables)
        else:
            _by_scatter(a, g, out, tables, seed & 0xFFFFFFFFFFFFFFFF, stream & 0xFFFFFFFF)
    return out


def refuse_sketch(
    a: Tensor, g: Tensor, rank: int, seed: int, stream: int, kind: str = "tensor", route: str = "auto"
) -> str | None:
    """Why this call is not for the kernel, or None."""
    wide = wide_dtype(a.dtype)
    if wide not in _NAMES:
        return f"the tensors are {a.dtype}; it takes float64, float32 and half precision"
    if kind not in ("tensor", "sjlt"):
        return f"kind {kind!r}; it takes 'tensor' and 'sjlt', the triton kernel has the others"
    if kind == "tensor" and route == "fft" and not _takes_fft(rank, wide):
        return f"the fft route with rank {rank}; it takes powers of two up to 4096"
    if rank * _ROWS * wide.itemsize > _SHARED:
        return f"rank {rank}; it takes at most {_SHARED // _ROWS // wide.itemsize}, whose sums fit shared memory"
    if -(-g.shape[0] * g.shape[1] // _ROWS) > 65535:
        return "more rows than a launch grid holds"
    return None


def _takes_fft(rank: int, dtype: torch.dtype) -> bool:
    return rank & (rank - 1) == 0 and 2 <= rank <= 4096 and 2 * rank * dtype.itemsize <= _SHARED


def _cheap_fft(a: Tensor, g: Tensor) -> bool:
    """A transform a position against a row formed and scattered entry by entry; not measured on a GPU yet."""
    (_, _, s, o), i = g.shape, a.shape[2]
    return s * (i + o + 40_000) < o * i * (4.0 + 0.05 * s)


def _tables(a: Tensor, g: Tensor, rank: int, seed: int, stream: int) -> tuple[Tensor, ...]:
    place_a, sign_a = bucket_and_sign(a.shape[2], rank, 0, stream, seed, a.device, a.dtype)
    place_g, sign_g = bucket_and_sign(g.shape[3], rank, 1, stream, seed, a.device, a.dtype)
    return place_a.int(), sign_a, place_g.int(), sign_g


@functools.lru_cache(maxsize=16)
def _roots(rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """exp(-2 pi i j / rank), j < rank / 2, as pairs; and the numbers 0 .. rank - 1 with their bits reversed."""
    angle = torch.arange(rank // 2, dtype=torch.float64, device=device) * (-2 * math.pi / rank)
    roots = torch.stack([angle.cos(), angle.sin()], 1).to(dtype)
    number, reverse = torch.arange(rank, device=device), torch.zeros(rank, dtype=torch.int64, device=device)
    for _ in range(rank.bit_length() - 1):
        reverse, number = (reverse << 1) | (number & 1), number >> 1
    return roots.contiguous(), reverse.int()


def _by_fft(a: Tensor, g: Tensor, out: Tensor, tables: tuple[Tensor, ...]) -> None:
    (n, k, s, o), i, rank = g.shape, a.shape[2], out.shape[2]
    roots, reverse = _roots(rank, a.dtype, a.device)
    place_a, sign_a, place_g, sign_g = tables
    place_a, place_g = reverse[place_a.long()], reverse[place_g.long()]
    size = 2 * rank * a.element_size()
    args = (a, g, k, s, i, o, rank.bit_length() - 1, place_a, sign_a, place_g, sign_g, roots, out)
    _nvrtc.launch("sketch.cu", f"tensor_fft_{_NAMES[a.dtype]}", (n * k,), _THREADS, size, a, *args)


def _by_scatter(a: Tensor, g: Tensor, out: Tensor, tables: tuple, seed: int, stream: int) -> None:
    (n, k, s, o), i = g.shape, a.shape[2]
    if s == 1 and i == 1:  # rows as they are, scaled at the end; a table of one input has one place and one sign
        if tables[0] is None:
            _scatter(g, None, n * k, 1, 1, 1, o, 0, tables, seed, stream, out)
            out *= a
            return
    if s < _FORMED:
        _scatter(a, g, n * k, k, s, i, o * i, 0, tables, seed, stream, out)
        return
    samples = max(1, min(n, _ELEMENTS // (k * i)))
    part = max(1, min(o, _ELEMENTS // (samples * k * i)))
    for n0 in range(0, n, samples):
        for o0 in range(0, o, part):
            strip = g[n0 : n0 + samples, :, :, o0 : o0 + part]
            rows = strip.transpose(2, 3) @ a[n0 : n0 + samples, None]  # [samples, k, part, i]
            if tables[0] is None:
                own = tables
            else:
                own = (*tables[:2], tables[2][o0 : o0 + part], tables[3][o0 : o0 + part])
            count, target = rows.shape[0] * k, out[n0 : n0 + samples]
            _scatter(rows, None, count, k, s, i, rows.shape[2] * i, o0 * i, own, seed, stream, target)


def _scatter(x, g, rows, k, s, i, length, first, tables, seed, stream, out: Tensor) -> None:
    rank, groups = out.shape[2], -(-rows // _ROWS)
    chunks = max(1, min(-(-length // (16 * _THREADS)), -(-1024 // groups)))
    own = [0 if table is None else table.contiguous() for table in tables]
    args = (x, 0 if g is None else g, rows, k, s, i, length, first, *own, stream, seed, rank, out)
    size = _ROWS * rank * out.element_size()
    _nvrtc.launch("sketch.cu", f"scatter_rows_{_NAMES[out.dtype]}", (chunks, groups), _THREADS, size, out, *args)
