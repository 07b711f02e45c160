"""Triton kernels of the dense sketches: rows times random signs, drawn in registers where they are used.

    two_sided     a is projected; a tile of (Pg g)(Pa a)^T stands in registers while positions of one sample pass by,
                  whose g are projected there. Few positions: both are projected, and a batched product adds them up
    rademacher    one position: out = sum_o g[o] (a . signs[o]), the row [o, i] is never formed
                  several: rows are formed some samples at a time

Signs that a tile needs again every few positions come from a table. They are exact in every dtype, so float32 goes
through the tensor cores in three bfloat16 parts that hold all its bits. The sum over o is kept apart from the sums of
the products: tensor cores cut their sums off instead of rounding them, which would show over millions of terms.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import FILL, dense, product, refuse, refuse_programs, split
from .._register import wide_dtype
from ._random import signs

_ELEMENTS = 1 << 28  # of the rows formed at one time
_TABLE = 1 << 24  # signs of a table


@triton.jit
def philox(low, high, word, stream, seed_low, seed_high):
    """Philox4x32-10, as _random.philox: four words of counter (low, high, word, stream), uint32."""
    zero = low * 0
    return tl.philox_impl(
        low, high, zero + word.to(tl.uint32, bitcast=True), zero + stream.to(tl.uint32, bitcast=True),
        zero + seed_low.to(tl.uint32, bitcast=True), zero + seed_high.to(tl.uint32, bitcast=True),
    )  # fmt: skip


@triton.jit
def times_signs(
    total, from_x, m_row, size, first, begin, word, stream, seed_low, seed_high,
    BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """total + lines of x [., size] times the signs of indices first .. and columns begin .."""
    kind = total.dtype
    inside = tl.arange(0, BLOCK_C)
    group = tl.zeros((BLOCK_C,), dtype=tl.uint32) + (begin // 128).to(tl.uint32)
    bit = ((begin + tl.arange(0, total.shape[1])) % 128).to(tl.int32)[None, :]
    for step in range(0, size, BLOCK_C):
        m_inside = inside < size - step
        x = tl.load(from_x[:, None] + (step + inside)[None, :], mask=m_row[:, None] & m_inside[None, :], other=0.0)
        index = (first + step + inside).to(tl.uint32)
        w0, w1, w2, w3 = philox(group, index, word, stream, seed_low, seed_high)
        early = tl.where(bit < 32, w0[:, None], w1[:, None])
        late = tl.where(bit < 96, w2[:, None], w3[:, None])
        bits = (tl.where(bit < 64, early, late) >> (bit % 32).to(tl.uint32)) & 1
        sign = tl.where(bits == 0, 1.0, -1.0)
        if PARTS == 0:
            total = product(x.to(kind), sign.to(kind), total, "ieee")
        elif PARTS == 1:
            total = product(x, sign.to(x.dtype), total, "ieee")
        else:
            rest = x.to(tl.float32)
            for _ in tl.static_range(PARTS):
                held, rest = split(rest)
                total = product(held, sign.to(tl.bfloat16), total, "ieee")
    return total


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
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=kind)
    for step in range(0, tl.minimum(o_size - part * o_span, o_span).to(tl.int32)):
        o = part * o_span + step
        here = times_signs(
            tl.zeros((BLOCK_M, BLOCK_N), dtype=kind), p_x + row // k * x_row + o * x_step, m_row, i_size, o * i_size,
            begin, word, stream, seed_low, seed_high, BLOCK_C, PARTS,
        )  # fmt: skip
        if TIMES_G:
            g = tl.load(p_g + row * o_size + o, mask=m_row, other=0.0)
            here = here * g.to(kind)[:, None]
        total += here
    to = p_out + (part * rows + row)[:, None] * columns + column[None, :]
    tl.store(to, total, mask=m_row[:, None] & (column < columns)[None, :])


@triton.jit
def two_sided_kernel(
    p_g, p_signs, p_right, p_out,
    rows, k, s, o_size, width, side, s_span, x_tiles, y_tiles,
    BLOCK_S: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[part, row, x, y] = sum_{s in part} (sum_o g[row, s, o] signs[o, x]) right[row // k, s, y]."""
    kind = p_out.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    row, tile = tile % rows, tile // rows
    y = tile % y_tiles * BLOCK_Y + tl.arange(0, BLOCK_Y)
    tile = tile // y_tiles
    begin, part = tile % x_tiles * BLOCK_X, tile // x_tiles
    x, inside = begin + tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_X, BLOCK_Y), dtype=kind)
    for step in range(0, s_span, BLOCK_S):
        place = part * s_span + step + tl.arange(0, BLOCK_S)
        m_place = place < s
        left = tl.zeros((BLOCK_S, BLOCK_X), dtype=kind)
        for first in range(0, o_size, BLOCK_C):
            m_inside = inside < o_size - first
            from_g = p_g + ((row * s + place) * o_size)[:, None] + (first + inside)[None, :]
            g = tl.load(from_g, mask=m_place[:, None] & m_inside[None, :], other=0.0)
            from_signs = p_signs + (first + inside)[:, None] * width + x[None, :]
            sign = tl.load(from_signs, mask=m_inside[:, None] & (x < width)[None, :], other=0.0)
            if PARTS <= 1:
                left = product(g, sign, left, "ieee")
            else:
                rest = g.to(tl.float32)
                for _ in tl.static_range(PARTS):
                    held, rest = split(rest)
                    left = product(held, sign, left, "ieee")
        of_right = (row // k * s + place)[:, None] * side + y[None, :]
        right = tl.load(p_right + of_right, mask=m_place[:, None] & (y < side)[None, :], other=0.0)
        left = tl.trans(left)
        if PARTS == 0:
            total = product(left, right, total, "ieee")
        else:  # both sides in three parts that tensor cores hold exactly; what is left out is below rounding
            l0, left = split(left)
            l1, left = split(left)
            l2, left = split(left)
            r0, right = split(right)
            r1, right = split(right)
            r2, right = split(right)
            total = product(l0, r2, total, "ieee")
            total = product(l2, r0, total, "ieee")
            total = product(l1, r1, total, "ieee")
            total = product(l0, r1, total, "ieee")
            total = product(l1, r0, total, "ieee")
            total = product(l0, r0, total, "ieee")
    to = p_out + ((part * rows + row) * width + x)[:, None] * side + y[None, :]
    tl.store(to, total, mask=(x < width)[:, None] & (y < side)[None, :])


# rows and columns of a tile (at most 128: one counter), depth of a product, parts of x, warps, stages
BLOCKS = {
    torch.float64: (32, 32, 16, 0, 4, 2),
    torch.float32: (128, 64, 32, 3, 8, 3),
    torch.bfloat16: (128, 128, 32, 1, 8, 3),
    torch.float16: (128, 128, 32, 1, 8, 3),
}
# positions at a time (at most), rows and columns of a tile, depth of a product, parts of g, warps, stages
_OUTER_HALF = (64, 64, 64, 64, 1, 8, 3)
OUTER = {
    torch.float64: (32, 32, 32, 16, 0, 4, 2),
    torch.float32: (32, 64, 64, 32, 3, 8, 3),
    torch.bfloat16: _OUTER_HALF,
    torch.float16: _OUTER_HALF,
}
LEAST_POSITIONS = 16  # of a product; fewer of one sample would leave most of a tile empty


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


def _outer_plan(dtype: torch.dtype, rows: int, s: int, width: int, side: int) -> tuple:
    """(programs, positions at a time, (span, tiles of x, tiles of y), parts)."""
    block_s, block_x, block_y, *_ = OUTER[dtype]
    block_s = max(LEAST_POSITIONS, min(block_s, triton.next_power_of_2(s)))
    x_tiles, y_tiles = -(-width // block_x), -(-side // block_y)
    steps = -(-s // block_s)
    span = -(-steps // min(steps, -(-FILL // (rows * x_tiles * y_tiles)))) * block_s
    parts = -(-s // span)
    return rows * x_tiles * y_tiles * parts, block_s, (span, x_tiles, y_tiles), parts


@functools.lru_cache(maxsize=512)
def _table(o: int, width: int, word: int, stream: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Signs [o, width]; made on the CPU: a copy from there is complete when it returns, and any stream may use it."""
    return signs(o, width, word, stream, seed, "cpu", dtype).to(device)


def outer(g: Tensor, right: Tensor, width: int, word: int, key: tuple) -> Tensor:
    """sum_s (g signs)^T right: g [n, k, s, o], right [n, s, side] to [n k, width, side]."""
    (n, k, s, o), side, (seed, stream) = g.shape, right.shape[2], key
    _, block_x, block_y, block_c, pieces, warps, stages = OUTER[g.dtype]
    programs, block_s, spans, parts = _outer_plan(g.dtype, n * k, s, width, side)
    table = _table(o, width, word, stream, seed, torch.bfloat16 if pieces > 1 else g.dtype, g.device)
    out = right.new_empty(parts, n * k, width, side)
    with torch.cuda.device_of(g):
        two_sided_kernel[(programs,)](
            g, table, right, out, n * k, k, s, o, width, side, *spans,
            BLOCK_S=block_s, BLOCK_X=block_x, BLOCK_Y=block_y, BLOCK_C=block_c, PARTS=pieces,
            num_warps=warps if block_s > 16 else 4, num_stages=stages,
        )  # fmt: skip
    return out.sum(0) if parts > 1 else out[0]


def _sides(rank: int) -> tuple[int, int]:
    """Features of g and of a: two factors of the rank as near to each other as there are."""
    side = max(d for d in range(1, math.isqrt(rank) + 1) if rank % d == 0)
    return rank // side, side


def _is_fused(dtype: torch.dtype, s: int, o: int, rank: int) -> bool:
    """Whether positions fill a product, g is projected at most twice for all columns, and the table is small."""
    width, side = _sides(rank)
    return s >= LEAST_POSITIONS and side <= 2 * OUTER[dtype][2] and o * width <= _TABLE


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
        width, side = _sides(rank)
        right = project(a, None, (n * s, 1, 1, i), side, 0, key)
        if _is_fused(a.dtype, s, o, rank):
            return outer(g, right.view(n, s, side), width, 1, key).reshape(n, k, rank).div_(math.sqrt(rank))
        left = project(g, None, (n * k * s, 1, 1, o), width, 1, key)
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
        fused = _outer_plan(dtype, n * k, s, *_sides(rank))[0] if _is_fused(dtype, s, o, rank) else 0
        return refuse_programs(max(m_tiles * n_tiles, fused))
    m_tiles, n_tiles, _ = _plan(dtype, n * k, rank, o)
    return refuse_programs(m_tiles * n_tiles * 32)
