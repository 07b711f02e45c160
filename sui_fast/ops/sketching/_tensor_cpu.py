"""C++ kernels of the tensor sketch (csrc/cpu/tensor_kernels.cpp), adding to sums that several layers share.

The fft route leaves its sums in the Fourier domain; `finish` brings all of them back at once.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ... import _cpu
from ._fold import fold
from ._random import divisors, steps

NAMES = {torch.float32: "float32", torch.float64: "float64"}
_LEAST = 64  # places of a ring
_ROWS = 1 << 19  # numbers of formed rows at a time: they stay in the second cache


@functools.lru_cache(maxsize=64)
def call(name: str, dtype: torch.dtype):
    return getattr(_cpu, f"{name}_{NAMES[dtype]}")


@functools.lru_cache(maxsize=1024)
def hashed(
    size: int, buckets: int, word: int, stream: int, seed: int, dtype: torch.dtype, step: int = 0
) -> tuple[Tensor, Tensor]:
    """Places and signs of 0 .. size - 1, as `bucket_and_sign`; not to be written to."""
    place, sign = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=dtype)
    call("hash", dtype)(word, stream, seed, 0, size, buckets, place.data_ptr(), sign.data_ptr())
    return (torch.arange(size, dtype=torch.int32) * step if step else place), sign


@functools.lru_cache(maxsize=1024)
def sides(i: int, o: int, ones: bool, rank: int, stream: int, seed: int, dtype: torch.dtype):
    """Places and signs of inputs and of outputs."""
    step_a, step_g = steps(i, o, rank)
    return hashed(i + ones, rank, 0, stream, seed, dtype, step_a), hashed(o, rank, 1, stream, seed, dtype, step_g)


@functools.lru_cache(maxsize=1024)
def ring(i: int, o: int, rank: int) -> tuple[int, int]:
    """Length of the transforms of a layer, and which side needs only one: 1 inputs, 2 outputs, 0 both.

    Where the shorter side has every q-th place of the rank, the other one falls into q rings that it turns alike.
    """
    step = max(steps(i, o, rank))
    for length in divisors(rank)[:-1] if step else ():
        if length >= _LEAST and length % 2 == 0 and step % (rank // length) == 0 and _smooth(length):
            return length, 1 if i <= o else 2
    return fourier_length(rank), 0


@functools.lru_cache(maxsize=1024)
def _ring_sides(i: int, o: int, ones: bool, rank: int, stream: int, seed: int, dtype: torch.dtype):
    """``sides`` with places by rings, one ring after the other, and their addresses."""
    found, (length, short) = sides(i, o, ones, rank, stream, seed, dtype), ring(i, o, rank)
    q, tables = rank // length, []
    for number, (place, sign) in enumerate(found, 1):
        if short:
            place = place // q if number == short else place % q * length + place // q
        tables.append(((place, sign), place.data_ptr(), sign.data_ptr()))
    return tables


@functools.lru_cache(maxsize=1024)
def fourier_length(rank: int) -> int:
    """Length of the transforms that serve a rank: itself, or one that holds 2 rank - 1; even, of small factors."""
    if rank % 2 == 0 and _smooth(rank):
        return rank
    return next(length for length in itertools.count(2 * rank, 2) if _smooth(length))


def side_of(x: Tensor, length: int, ones: bool, table: tuple[Any, int, int]) -> list[int]:
    """A side as the kernel takes it; x [n, s, length] or [n, k, s, length], positions or features adjacent."""
    n, *c, s, f = x.stride()
    return [x.data_ptr(), x.dtype == torch.bfloat16, n, *(c or (0,)), s, f, length, ones, *table[1:]]


def readable_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype that the kernels read."""
    return x if x.dtype == dtype or x.dtype == torch.bfloat16 and dtype == torch.float32 else x.to(dtype)


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [n, (k,) s, length] in a layout and dtype that the kernel reads."""
    x = readable_dtype(x, dtype)
    if x.stride(-1) == 1:
        return x
    return x if x.stride(-2) == 1 and x.shape[-2] >= 16 and x.shape[-1] > 1 else x.contiguous()


def add_fourier(
    layers: list[tuple[Tensor, Tensor, int, bool]], rank: int, sums: Tensor, length: int, seed: int
) -> None:
    """sums [n, k, :] += products of the transforms of layers (a, g, stream, ones) of equal n, k, s and ``ring_of``."""
    (n, k, s, _), dtype = layers[0][1].shape, sums.dtype
    kept, told = [], []
    for a, g, stream, ones in layers:
        i, o = a.shape[2], g.shape[3]
        a, g = _readable(a, dtype), _readable(g, dtype)
        left, right = _ring_sides(i, o, ones, rank, stream, seed, dtype)
        kept.append((a, g, left, right))
        told.append((side_of(a, i, ones, left), side_of(g, o, False, right), ring(i, o, rank)[1]))
    call("fourier", dtype)(told, n, k, s, sums.shape[2], length, sums.data_ptr(), torch.get_num_threads())


def prefers_fourier(a: Tensor, g: Tensor, ones: bool, out: Tensor) -> bool:
    n, k, s, o = g.shape
    return fft_is_cheaper(n, s, a.shape[2] + ones, o, k, out.shape[2])


def ring_of(a: Tensor, g: Tensor, out: Tensor) -> int:
    """Layers with the same one share sums."""
    return ring(a.shape[2], g.shape[3], out.shape[2])[0]


def new_sums(out: Tensor, length: int) -> Tensor:
    return out.new_zeros(*out.shape[:2], max(length, out.shape[2]))


def finish(sums: Tensor, length: int, out: Tensor) -> None:
    """out [n, k, rank] += the sketches that the sums of `add_fourier` belong to."""
    (n, k, whole), rank = sums.shape, out.shape[2]
    found = out if whole == rank else torch.zeros_like(sums)
    call("fourier_finish", out.dtype)(sums.data_ptr(), n * k, whole, length, found.data_ptr(), torch.get_num_threads())
    if whole != rank:
        out += fold(found, rank)


def add_scatter(a: Tensor, g: Tensor, out: Tensor, seed: int, stream: int, ones: bool) -> None:
    """Rows [o, i] of some samples at a time, by matrix products, scattered to out [n, k, rank]."""
    (n, k, s, o), i, rank, dtype = g.shape, a.shape[2], out.shape[2], out.dtype
    left, right = sides(i, o, ones, rank, stream, seed, dtype)
    if ones:
        add_bias(g.sum(2, dtype=dtype), left, right, i, out)
    step = -(-max(16 // k, min(n, _ROWS // (k * o * i))) // 16) * 16
    flip = i < o  # the longer lines innermost
    tables = [*left, *right] if flip else [*right, *left]
    sizes = (i, o) if flip else (o, i)
    for n0 in range(0, n, step):
        x, y = a[n0 : n0 + step].to(dtype), g[n0 : n0 + step].to(dtype)
        if s == 1:  # products of single numbers go faster one by one than as matrices
            rows = x.transpose(1, 2)[:, None] * y if flip else y.transpose(2, 3) * x[:, None]
            rows = rows.contiguous()
        elif flip:
            rows = x.transpose(1, 2)[:, None] @ y
        elif k == 1:
            rows = y[:, 0].transpose(1, 2) @ x
        else:
            rows = y.transpose(2, 3).reshape(len(x), k * o, s) @ x
        args = (rows.data_ptr(), len(x) * k, *sizes, *(t.data_ptr() for t in tables), rank)
        call("scatter_rows", dtype)(*args, out[n0 : n0 + step].data_ptr(), torch.get_num_threads())


def add_bias(rows: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], i: int, out: Tensor) -> None:
    """Rows [n, k, o, 1] at the place of input i, the last: a column joined to a would be a copy of a."""
    (n, k, o), rows = rows.shape, rows.contiguous()
    tables = [right[0].data_ptr(), right[1].data_ptr(), left[0][i:].data_ptr(), left[1][i:].data_ptr()]
    args = (rows.data_ptr(), n * k, o, 1, *tables, out.shape[2])
    call("scatter_rows", out.dtype)(*args, out.data_ptr(), torch.get_num_threads())


def add_formed(rows: Tensor, bias: Tensor | None, out: Tensor, seed: int, stream: int) -> None:
    """Rows [n, k, o, i] and those of a bias [n, k, o], scattered to out [n, k, rank]."""
    (n, k, o, i), rank, dtype = rows.shape, out.shape[2], out.dtype
    left, right = sides(i, o, bias is not None, rank, stream, seed, dtype)
    if bias is not None:
        add_bias(bias.to(dtype), left, right, i, out)
    rows = rows.to(dtype).contiguous()
    args = (rows.data_ptr(), n * k, o, i, *(t.data_ptr() for t in (*right, *left)), rank)
    call("scatter_rows", dtype)(*args, out.data_ptr(), torch.get_num_threads())


def add_index(token: Tensor, g: Tensor, vocabulary: int, out: Tensor, seed: int, stream: int) -> None:
    """One-hot rows of tokens [n, s] (-1: none) and g [n, k, s, o], scattered to out [n, k, rank]."""
    (n, k, s, o), rank, dtype = g.shape, out.shape[2], out.dtype
    token, g = token.contiguous(), g.to(dtype).contiguous()
    of_row, of_token = sides(o, vocabulary, False, rank, stream, seed, dtype)
    pointers = (t.data_ptr() for t in (*of_token, *of_row))
    args = (g.data_ptr(), n, k, s, o, token.data_ptr(), *pointers, rank, out.data_ptr(), torch.get_num_threads())
    call("scatter_index", dtype)(*args)


# Nanoseconds per sample, fitted to some hundred random shapes (AVX-512); vectors are full or paid in full
def fft_time(n: int, s: int, i: int, o: int, k: int, rank: int) -> float:
    """Of `add_fourier` and `finish`."""
    length, one = ring(i, o, rank)
    whole, bits = max(length, rank), math.log2(length)
    size_a, size_g = length if one == 1 else whole, length if one == 2 else whole
    positions, rows = -(-s // 16) * 16 if s >= 16 else -(-n * s // 16) * 16 / n, -(-n * k // 16) * 16 / n
    of_a = k if s > 16 else 1
    transforms = 0.03 * bits * (of_a * size_a + k * size_g) + 0.22 * k * whole
    return 7_500 / n + positions * (transforms + 0.21 * (of_a * i + k * o)) + 0.8 * rows * whole


def scatter_time(n: int, s: int, i: int, o: int, k: int, rank: int) -> float:
    rows = -(-n * k // 16) * 16 / n
    entry = 0.2 if rank <= 2048 else 0.25 if rank <= 5500 else 0.33
    products = s * (0.032 * k * o * i + 0.17 * (i + k * o))
    return 19_000 / n + rows * (0.065 * o * i + 0.385 * rank) + entry * k * o * i + products


@functools.lru_cache(maxsize=1024)
def fft_is_cheaper(n: int, s: int, i: int, o: int, k: int, rank: int) -> bool:
    """Whether the way through the Fourier domain takes less time than the scatter route."""
    sizes = n, s, i, o, k, rank
    return fft_time(*sizes) < scatter_time(*sizes)


def _smooth(rank: int) -> bool:
    for factor in (2, 3, 5, 7, 11):
        while rank % factor == 0:
            rank //= factor
    return rank == 1
