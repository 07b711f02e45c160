"""C++ kernels of the tensor sketch (csrc/cpu/tensor_kernels.cpp), adding to sums that several layers share.

The fft route leaves its sums in the Fourier domain, in the order in which the transform ends; `finish` brings all of
them back at once.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ... import _cpu

NAMES = {torch.float32: "float32", torch.float64: "float64"}
_ROWS = 1 << 19  # numbers of formed rows at a time: they stay in the second cache


def call(name: str, dtype: torch.dtype):
    return getattr(_cpu, f"{name}_{NAMES[dtype]}")


@functools.lru_cache(maxsize=1024)
def hashed(size: int, buckets: int, word: int, stream: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Places and signs of 0 .. size - 1; not to be written to."""
    place, sign = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=dtype)
    call("hash", dtype)(word, stream, seed, 0, size, buckets, place.data_ptr(), sign.data_ptr())
    return place, sign


def has_fourier(rank: int) -> bool:
    """Whether the transform of this length is in C++: powers of two."""
    least, most = _cpu.FOURIER_RANKS
    return least <= rank <= most and rank & (rank - 1) == 0


@functools.lru_cache(maxsize=16)
def _tables(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and sines of -2 pi j / rank; the frequency that ends at each place, and the place of each frequency."""
    angle = torch.arange(rank, dtype=torch.float64) * (-2 * math.pi / rank)
    frequency, place = torch.empty(rank, dtype=torch.int32), torch.empty(rank, dtype=torch.int32)
    call("fourier_order", dtype)(rank, frequency.data_ptr())
    place[frequency.long()] = torch.arange(rank, dtype=torch.int32)
    return torch.cat([angle.cos(), angle.sin()]).to(dtype), frequency, place


@functools.lru_cache(maxsize=1024)
def _hashed(*key) -> tuple[tuple[Tensor, Tensor], int, int]:
    """Places and signs as ``hashed`` gives them, with their addresses."""
    table = hashed(*key)
    return table, table[0].data_ptr(), table[1].data_ptr()


def _side(x: Tensor, length: int, ones: bool, table: tuple[Any, int, int]) -> list[int]:
    """A side as the kernel takes it; x [n, k or 1, s, length], positions or features adjacent."""
    n, c, s, f = x.stride()
    half = x.dtype == torch.bfloat16
    return [x.data_ptr(), half, n, c if x.shape[1] > 1 else 0, s, f, length, ones, table[1], table[2]]


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [n, k, s, length] in a layout and dtype that the kernel reads."""
    if x.dtype != dtype and not (x.dtype == torch.bfloat16 and dtype == torch.float32):
        x = x.to(dtype)
    if x.stride(3) == 1 or x.shape[3] == 1:
        return x if x.stride(3) == 1 else x.contiguous()
    return x if x.stride(2) == 1 and x.shape[2] >= 16 else x.contiguous()


def add_fourier(layers: list[tuple[Tensor, Tensor, int, bool]], sums: Tensor, seed: int) -> None:
    """sums [n, k, 2, rank] of the squares of the transforms of layers (a, g, stream, ones) of equal n, k, s."""
    (n, k, s, _), rank, dtype = layers[0][1].shape, sums.shape[3], sums.dtype
    kept, sides = [], []
    for a, g, stream, ones in layers:
        i, o = a.shape[2], g.shape[3]
        a, g = _readable(a[:, None], dtype), _readable(g, dtype)
        left, right = _hashed(i + ones, rank, 0, stream, seed, dtype), _hashed(o, rank, 1, stream, seed, dtype)
        kept.append((a, g, left, right))
        sides.append((_side(a, i, ones, left), _side(g, o, False, right)))
    roots = _tables(rank, dtype)[0]
    call("fourier", dtype)(sides, n, k, s, rank, roots.data_ptr(), sums.data_ptr(), torch.get_num_threads())


def finish(sums: Tensor, out: Tensor) -> None:
    """out [n, k, rank] += the sketches that the sums of `add_fourier` belong to."""
    (n, k, _, rank), dtype = sums.shape, sums.dtype
    tables = (table.data_ptr() for table in _tables(rank, dtype))
    call("fourier_finish", dtype)(sums.data_ptr(), n * k, rank, *tables, out.data_ptr(), torch.get_num_threads())


def add_scatter(a: Tensor, g: Tensor, out: Tensor, seed: int, stream: int, ones: bool) -> None:
    """Rows [o, i] of some samples at a time, by matrix products, scattered to out [n, k, rank]."""
    (n, k, s, o), i, rank, dtype = g.shape, a.shape[2], out.shape[2], out.dtype
    left, right = hashed(i + ones, rank, 0, stream, seed, dtype), hashed(o, rank, 1, stream, seed, dtype)
    if ones:
        _add_bias(g.sum(2, dtype=dtype), left, right, i, out)
    step = -(-max(16 // k, min(n, _ROWS // (k * o * i))) // 16) * 16
    flip = i < o  # the longer lines innermost
    tables = [*left, *right] if flip else [*right, *left]
    sizes = (i, o) if flip else (o, i)
    for n0 in range(0, n, step):
        x, y = a[n0 : n0 + step].to(dtype), g[n0 : n0 + step].to(dtype)
        if i == 1 and s == 1:
            rows = (y[:, :, 0] * x[:, :, :1]).contiguous()
        elif flip:
            rows = x.transpose(1, 2)[:, None] @ y
        elif k == 1:
            rows = y[:, 0].transpose(1, 2) @ x
        else:
            rows = y.transpose(2, 3).reshape(len(x), k * o, s) @ x
        args = (rows.data_ptr(), len(x) * k, *sizes, *(t.data_ptr() for t in tables), rank)
        call("scatter_rows", dtype)(*args, out[n0 : n0 + step].data_ptr(), torch.get_num_threads())


def _add_bias(rows: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], i: int, out: Tensor) -> None:
    """Rows [n, k, o, 1] at the place of input i, the last: a column joined to a would be a copy of a."""
    (n, k, o), rows = rows.shape, rows.contiguous()
    tables = [right[0].data_ptr(), right[1].data_ptr(), left[0][i:].data_ptr(), left[1][i:].data_ptr()]
    args = (rows.data_ptr(), n * k, o, 1, *tables, out.shape[2])
    call("scatter_rows", out.dtype)(*args, out.data_ptr(), torch.get_num_threads())


def add_formed(rows: Tensor, bias: Tensor | None, out: Tensor, seed: int, stream: int) -> None:
    """Rows [n, k, o, i] and those of a bias [n, k, o], scattered to out [n, k, rank]."""
    (n, k, o, i), rank, dtype = rows.shape, out.shape[2], out.dtype
    left = hashed(i + (bias is not None), rank, 0, stream, seed, dtype)
    right = hashed(o, rank, 1, stream, seed, dtype)
    if bias is not None:
        _add_bias(bias.to(dtype), left, right, i, out)
    rows = rows.to(dtype).contiguous()
    args = (rows.data_ptr(), n * k, o, i, *(t.data_ptr() for t in (*right, *left)), rank)
    call("scatter_rows", dtype)(*args, out.data_ptr(), torch.get_num_threads())


def add_index(token: Tensor, g: Tensor, vocabulary: int, out: Tensor, seed: int, stream: int) -> None:
    """One-hot rows of tokens [n, s] (-1: none) and g [n, k, s, o], scattered to out [n, k, rank]."""
    (n, k, s, o), rank, dtype = g.shape, out.shape[2], out.dtype
    token, g = token.contiguous(), g.to(dtype).contiguous()
    tables = (*hashed(vocabulary, rank, 1, stream, seed, dtype), *hashed(o, rank, 0, stream, seed, dtype))
    pointers = (t.data_ptr() for t in tables)
    args = (g.data_ptr(), n, k, s, o, token.data_ptr(), *pointers, rank, out.data_ptr(), torch.get_num_threads())
    call("scatter_index", dtype)(*args)


def fft_is_cheaper(s: int, i: int, o: int, k: int, rank: int) -> bool:
    """Whether the fft route takes less time, in nanoseconds per sample (fitted to measurements, AVX-512)."""
    transform = rank * max(math.log2(rank), 1.0)
    if has_fourier(rank):
        fft = s * k * (0.1 * transform + 0.25 * (i + o)) + 1.5 * k * rank
    else:
        transform *= 1 if _smooth(rank) else 4
        fft = 2200 + s * (0.78 * (i + k * o) + 0.096 * (1 + k) * transform) + 0.2 * k * transform
    return fft < k * (o * i * (0.22 + 0.025 * s) + 0.7 * rank) + 300


def _smooth(rank: int) -> bool:
    for factor in (2, 3, 5, 7, 11, 13):
        while rank % factor == 0:
            rank //= factor
    return rank == 1
