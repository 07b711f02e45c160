"""Triton kernel of the dense sketches: rows times random signs that are drawn in registers where they are used.

    two_sided     a and g are projected, then one batched product sums over positions
    rademacher    one position: out = sum_o g[o] (a . signs[o]), the row [o, i] is never formed
                  several: rows are formed some samples at a time

Signs are exact in every dtype, so float32 goes through the tensor cores in three bfloat16 parts that hold all its bits.
The sum over o is kept apart from the sums of the products: tensor cores cut their sums off instead of rounding them,
which would show over millions of terms.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import FILL, dense, product, refuse, refuse_programs, split
from .._register import wide_dtype

_ELEMENTS = 1 << 28  # of the rows formed at one time


@triton.jit
def philox(low, high, word, stream, seed_low, seed_high):
    """Philox4x32-10, as _random.philox: four words of counter (low, high, word, stream), uint32."""
    zero = low * 0
    return tl.philox_impl(
        low, high, zero + word.to(tl.uint32, bitcast=True), zero + stream.to(tl.uint32, bitcast=True),
        zero + seed_low.to(tl.uint32, bitcast=True), zero + seed_high.to(tl.uint32, bitcast=True),
    )  # fmt: skip


@triton.jit(do_not_specialize=["word", "stream", "seed_low", "seed_high"])
def project_kernel(
    p_x, p_g, p_out,
    rows, k, o_size, i_size, columns, x_row, x_step, o_span, m_tiles, n_tiles, word, stream, seed_low, seed_high,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr, TIMES_G: tl.constexpr,
):  # fmt: skip
    """out[part, row, c] = sum_{o in part, i} x[row // k, o, i] (g[row, o]) sign(o i_size + i, c)."""
    kind = p_out.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    row = tile % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tile // m_tiles
    begin = tile % n_tiles * BLOCK_N
    part = tile // n_tiles
    column = begin + tl.arange(0, BLOCK_N)
    m_row = row < rows
    inside = tl.arange(0, BLOCK_C)
    group = tl.zeros((BLOCK_C,), dtype=tl.uint32) + (begin // 128).to(tl.uint32)
    bit = (column % 128).to(tl.int32)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=kind)
    for step in range(0, tl.minimum(o_size - part * o_span, o_span).to(tl.int32)):
        o = part * o_span + step
        from_x = p_x + (row // k * x_row + o * x_step)[:, None] + inside[None, :]
        here = tl.zeros((BLOCK_M, BLOCK_N), dtype=kind)
        for first in range(0, i_size, BLOCK_C):
            m_inside = inside < i_size - first
            x = tl.load(from_x + first, mask=m_row[:, None] & m_inside[None, :], other=0.0)
            index = (o * i_size + first + inside).to(tl.uint32)
            w0, w1, w2, w3 = philox(group, index, word, stream, seed_low, seed_high)
            early = tl.where(bit < 32, w0[:, None], w1[:, None])
            late = tl.where(bit < 96, w2[:, None], w3[:, None])
            bits = (tl.where(bit < 64, early, late) >> (bit % 32).to(tl.uint32)) & 1
            sign = tl.where(bits == 0, 1.0, -1.0)
            if PARTS == 0:
                here = product(x.to(kind), sign.to(kind), here, "ieee")
            elif PARTS == 1:
                here = product(x, sign.to(x.dtype), here, "ieee")
            else:
                rest = x.to(tl.float32)
                for _ in tl.static_range(PARTS):
                    held, rest = split(rest)
                    here = product(held, sign.to(tl.bfloat16), here, "ieee")
        if TIMES_G:
            g = tl.load(p_g + row * o_size + o, mask=m_row, other=0.0)
            here = here * g.to(kind)[:, None]
        total += here
    to = p_out + (part * rows + row)[:, None] * columns + column[None, :]
    tl.store(to, total, mask=m_row[:, None] & (column < columns)[None, :])


# rows and columns of a tile (at most 128: one counter), depth of a product, parts of x, warps, stages
BLOCKS = {
    torch.float64: (32, 32, 16, 0, 4, 2),
    torch.float32: (128, 64, 32, 3, 8, 3),
    torch.bfloat16: (128, 128, 32, 1, 8, 3),
    torch.float16: (128, 128, 32, 1, 8, 3),
}


def _signed(x: int) -> int:
    """The 32-bit word as a launch takes it: signed."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def _plan(dtype: torch.dtype, rows: int, columns: int, o: int) -> tuple[int, int, int]:
    block_m, block_n, *_ = BLOCKS[dtype]
    m_tiles, n_tiles = -(-rows // block_m), -(-columns // block_n)
    return m_tiles, n_tiles, -(-o // min(o, 32, -(-FILL // (m_tiles * n_tiles))))


def project(x: Tensor, g: Tensor | None, shape: tuple, columns: int, word: int, key: tuple) -> Tensor:
    """rows @ signs, [rows, columns]; shape (rows, outputs k of a row of x, o, i).

    With g [rows, o] a row is g x^T, x [rows / k, i]; without, a row is a row of x [rows, o i].
    """
    rows, k, o, i = shape
    (seed, stream), (block_m, block_n, block_c, parts, warps, stages) = key, BLOCKS[x.dtype]
    m_tiles, n_tiles, o_span = _plan(x.dtype, rows, columns, o)
    count = -(-o // o_span)
    out = x.new_empty(count, rows, columns, dtype=wide_dtype(x.dtype))
    with torch.cuda.device_of(x):
        project_kernel[(m_tiles * n_tiles * count,)](
            x, x if g is None else g, out,
            rows, k, o, i, columns, o * i if g is None else i, i if g is None else 0, o_span, m_tiles, n_tiles,
            *(_signed(w) for w in (word, stream, seed, seed >> 32)),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c, PARTS=parts, TIMES_G=g is not None,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out.sum(0) if count > 1 else out[0]


def sketch(
    a: Tensor, g: Tensor, rank: int, seed: int, stream: int, kind: str = "tensor", route: str = "auto"
) -> Tensor:
    """See the op of the same name."""
    (n, k, s, o), i = g.shape, a.shape[2]
    wide = wide_dtype(a.dtype)
    if a.numel() == 0 or g.numel() == 0:
        return a.new_zeros(n, k, rank, dtype=wide)
    a, g, key = dense(a), dense(g), (seed, stream)
    if kind == "two_sided":
        side = max(d for d in range(1, math.isqrt(rank) + 1) if rank % d == 0)
        left = project(g, None, (n * k * s, 1, 1, o), rank // side, 1, key)
        right = project(a, None, (n * s, 1, 1, i), side, 0, key)
        left, right = left.reshape(n, k, s, -1).transpose(2, 3), right.reshape(n, 1, s, side)
        return (left @ right).reshape(n, k, rank).div_(math.sqrt(rank))
    if s == 1:
        return project(a, g, (n * k, k, o, i), rank, 3, key).reshape(n, k, rank).div_(math.sqrt(rank))
    step = max(1, _ELEMENTS // (k * o * i))
    parts = []
    for begin in range(0, n, step):
        part = g[begin : begin + step].to(wide).transpose(2, 3).reshape(-1, k * o, s)
        rows = part @ a[begin : begin + step].to(wide)
        parts.append(project(rows, None, (len(rows) * k, 1, o, i), rank, 3, key))
    return torch.cat(parts).reshape(n, k, rank).div_(math.sqrt(rank))


def refuse_sketch(
    a: Tensor, g: Tensor, rank: int, seed: int, stream: int, kind: str = "tensor", route: str = "auto"
) -> str | None:
    """Why this call is not for the kernel, or None."""
    if kind not in ("two_sided", "rademacher"):
        return f"kind {kind!r}: the cuda kernel does these"
    reason = refuse(a)
    if reason is not None or 0 in (*a.shape, *g.shape):
        return reason
    (n, k, s, o), dtype = g.shape, a.dtype
    if kind == "two_sided":
        m_tiles, n_tiles, _ = _plan(dtype, n * k * s, rank, 1)
        return refuse_programs(m_tiles * n_tiles)
    m_tiles, n_tiles, _ = _plan(dtype, n * k, rank, o)
    return refuse_programs(m_tiles * n_tiles * 32)
