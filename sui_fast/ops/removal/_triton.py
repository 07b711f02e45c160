"""Triton kernels of block removal for blocks of few rows: u is read once for all poles, and once for the result.

``moments_kernel`` is a matrix product with rows formed on the fly: u_j u_l (j >= l) and u_j g of every block, times the
weights of all poles. The m x m systems are solved by PyTorch; ``change_kernel`` is the product back. All in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import dense, product, refuse, refuse_programs

MOST_ROWS = 4
_ELEMENTS = 1 << 25  # of the moments of one step


@triton.jit
def moments_kernel(
    p_u, p_g, p_w, p_out,
    count, m, r, columns, pairs, n_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """out[b, p, c] = sum_r left right w[r, c]; p < m: u_p g, beyond: u_j u_l, j >= l, row by row."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = row < count * pairs
    m_column = column < columns
    block, pair = row // pairs, row % pairs
    square = tl.maximum(pair - m, 0)
    j = (square >= 1).to(tl.int64) + (square >= 3).to(tl.int64) + (square >= 6).to(tl.int64)
    other = square - j * (j + 1) // 2
    with_g = pair < m
    left = (block * m + tl.where(with_g, pair, j)) * r
    right = (block * m + other) * r
    inside = tl.arange(0, BLOCK_R)
    if MATRIX:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float64)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float64)
    for begin in range(0, r, BLOCK_R):
        at = begin + inside
        m_at = at < r
        mask = m_row[:, None] & m_at[None, :]
        x = tl.load(p_u + left[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float64)
        y = tl.load(p_u + right[:, None] + at[None, :], mask=mask & (pair >= m)[:, None], other=0.0).to(tl.float64)
        g = tl.load(p_g + at, mask=m_at, other=0.0)
        x = x * tl.where(with_g[:, None], g[None, :], y)
        if MATRIX:
            of_w = at.to(tl.int64)[:, None] * columns + column[None, :]
            w = tl.load(p_w + of_w, mask=m_at[:, None] & m_column[None, :], other=0.0)
            total = product(x, w, total, "ieee")
        else:
            total += x * tl.load(p_w + at, mask=m_at, other=0.0)[None, :]
    if MATRIX:
        to = p_out + row[:, None] * columns + column[None, :]
        tl.store(to, total, mask=m_row[:, None] & m_column[None, :])
    else:
        tl.store(p_out + row, tl.sum(total, 1), mask=m_row)


@triton.jit
def change_kernel(
    p_u, p_y, p_w, p_r0, p_out,
    count, m, r, columns, n_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """out[b, r] = -sum_j u[b, j, r] (r0[b, j] + sum_c y[b, j, c] w[c, r])."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row, m_column = row < count, column < r
    mask = m_row[:, None] & m_column[None, :]
    inside = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float64)
    for j in range(0, m):
        at = row * m + j
        if MATRIX:
            r0 = tl.load(p_r0 + at, mask=m_row, other=0.0)
            back = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float64) + r0[:, None]
            for begin in range(0, columns, BLOCK_C):
                c = begin + inside
                y = tl.load(
                    p_y + at[:, None] * columns + c[None, :], mask=m_row[:, None] & (c < columns)[None, :], other=0.0
                )
                of_w = c.to(tl.int64)[:, None] * r + column[None, :]
                w = tl.load(p_w + of_w, mask=(c < columns)[:, None] & m_column[None, :], other=0.0)
                back = product(y, w, back, "ieee")
        else:
            y = tl.load(p_y + at, mask=m_row, other=0.0)
            back = y[:, None] * tl.load(p_w + column, mask=m_column, other=0.0)[None, :]
        u = tl.load(p_u + at[:, None] * r + column[None, :], mask=mask, other=0.0)
        total -= u.to(tl.float64) * back
    tl.store(p_out + row[:, None] * r + column[None, :], total, mask=mask)


# rows, columns and depth of a tile, warps, stages; for a matrix of weights and for one weight
MOMENTS = {True: (64, 32, 16, 4, 3), False: (16, 1, 128, 4, 3)}
CHANGE = {True: (64, 64, 16, 8, 2), False: (16, 128, 16, 4, 1)}


def _moments(u: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    """u_j g and u_j u_l of every block under each column of weights [r, columns]: [b, pairs, columns]."""
    (count, m, r), columns = u.shape, weights.shape[1]
    pairs, matrix = m + m * (m + 1) // 2, columns > 1
    block_m, block_n, block_r, warps, stages = MOMENTS[matrix]
    n_tiles = -(-columns // block_n)
    out = g.new_empty(count, pairs, columns)
    with torch.cuda.device_of(u):
        moments_kernel[(-(-count * pairs // block_m) * n_tiles,)](
            u, g, weights, out, count, m, r, columns, pairs, n_tiles,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r, MATRIX=matrix, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def _change(u: Tensor, y: Tensor, weights: Tensor, r0: Tensor, out: Tensor) -> None:
    (count, m, r), columns = u.shape, y.shape[2]
    matrix = columns > 1
    block_m, block_n, block_c, warps, stages = CHANGE[matrix]
    n_tiles = -(-r // block_n)
    with torch.cuda.device_of(u):
        change_kernel[(-(-count // block_m) * n_tiles,)](
            u, dense(y), weights, r0, out, count, m, r, columns, n_tiles,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c, MATRIX=matrix, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _square(moments: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Moments [b, pairs, ...] as right sides [b, m, ...] and symmetric matrices [b, m, m, ...]."""
    place = [[m + max(j, k) * (max(j, k) + 1) // 2 + min(j, k) for k in range(m)] for j in range(m)]
    return moments[:, :m], moments[:, torch.tensor(place, device=moments.device)]


def converged_removal(
    u: Tensor, s: Tensor, g: Tensor, rest: Tensor, null: Tensor, shift: float
) -> tuple[Tensor, Tensor]:
    """See the op of the same name."""
    count, m, r = u.shape
    if 0 in (count, m):
        return rest.clone(), s.new_zeros(count, r)
    u, s, g, rest, null = (dense(x) for x in (u, s, g, rest, null))
    weight = 1 / (s + shift)
    right, kernel = _square(_moments(u, g, weight[:, None])[..., 0], m)
    kernel, right = kernel + null / shift, right + rest / shift
    v = right / kernel[:, 0] if m == 1 else torch.linalg.solve(kernel, right)
    coef = s.new_empty(count, r)
    if r:
        _change(u, v[..., None], weight, rest, coef)
    return v.contiguous(), coef


def rational_removal(
    u: Tensor,
    s: Tensor,
    g: Tensor,
    rest: Tensor,
    null: Tensor,
    r0: Tensor,
    poles: Tensor,
    residues: Tensor,
    constant: float,
) -> Tensor:
    """See the op of the same name."""
    (count, m, r), q = u.shape, len(poles)
    coef = s.new_zeros(count, r)
    if 0 in (count, m, r):
        return coef
    u, s, g, rest, null, r0, poles, residues = (dense(x) for x in (u, s, g, rest, null, r0, poles, residues))
    if q == 0:
        return torch.sum(u * r0[..., None], 1, out=coef).mul_(-constant)
    resolvent = 1 / (s[:, None] - poles)
    weights = torch.cat([resolvent.real, resolvent.imag], 1)
    back, constant = weights.T.contiguous(), r0 * constant  # a launch takes a float in 32 bits
    step = max(1, _ELEMENTS // (2 * q * m * (m + 3)))
    for begin in range(0, count, step):
        part = slice(begin, begin + step)
        moments = _moments(u[part], g, weights)
        right, kernel = _square(torch.complex(moments[..., :q], moments[..., q:]), m)
        right = right - rest[part, :, None] / poles
        kernel = kernel - null[part, :, :, None] / poles
        if m == 1:
            y = right / kernel[:, 0]
        else:
            y = torch.linalg.solve(kernel.permute(0, 3, 1, 2), right.transpose(1, 2)).transpose(1, 2)
        y = y * residues
        _change(u[part], torch.cat([y.real, -y.imag], 2), back, constant[part], coef[part])
    return coef


def _refuse(u: Tensor, m_tile: int, n_tile: int) -> str | None:
    reason = refuse(u, (torch.float64, torch.float32))
    if reason is not None:
        return reason
    count, m, r = u.shape
    if m > MOST_ROWS:
        return f"blocks of {m} rows; it takes at most {MOST_ROWS}"
    return refuse_programs(max(-(-count // m_tile) * -(-r // n_tile), -(-count * m * (m + 3) // 32)))


def refuse_converged_removal(u: Tensor, s: Tensor, g: Tensor, rest: Tensor, null: Tensor, shift: float) -> str | None:
    """Why this call is not for the kernel, or None."""
    return _refuse(u, *CHANGE[False][:2])


def refuse_rational_removal(
    u: Tensor,
    s: Tensor,
    g: Tensor,
    rest: Tensor,
    null: Tensor,
    r0: Tensor,
    poles: Tensor,
    residues: Tensor,
    constant: float,
) -> str | None:
    """Why this call is not for the kernel, or None."""
    return _refuse(u, *CHANGE[True][:2])
