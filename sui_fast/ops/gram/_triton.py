"""Triton kernel of ntk_gram.

    result[(n, k), (m, l)] = sum_{s, t} (a1[n, s] . a2[m, t]) (g1[n, k, s] . g2[m, l, t])

A tile of the result covers some samples on each side. Both products stand in registers, are multiplied there and added
up; nothing of size (n s)^2 ever exists.

One position: the products of the a are made once, then one pair of outputs after the other is multiplied and written.
Several: the sums over positions must stay in registers, so a tile holds PAIR1 x PAIR2 pairs of outputs of fewer
samples; the products of the a are made once for those and repeated for the next. ``pairs`` chooses the fewest
operations. One output on each side repeats nothing in either case.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import dense, grouped, precision, refuse, refuse_programs, rows_product
from .._register import wide_dtype


@triton.jit
def gram_kernel(
    p_a1, p_g1, p_a2, p_g2, p_out,
    n1, n2, k1, k2, s1, s2, i_size, o_size, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PAIR1: tl.constexpr, PAIR2: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SAMPLES1: tl.constexpr = BLOCK_M // PAIR1
    SAMPLES2: tl.constexpr = BLOCK_N // PAIR2
    # 64-bit indices: rows x positions x layer size passes 2^31 long before memory ends
    tile = tl.program_id(0).to(tl.int64)
    n_rows, n_columns = tl.cdiv(n1, SAMPLES1), tl.cdiv(n2, SAMPLES2)
    chunk = tile // (n_rows * n_columns)
    first, second = grouped(tile % (n_rows * n_columns), n_rows, n_columns, 8)
    begin1, begin2 = first * SAMPLES1, second * SAMPLES2
    sample1, sample2 = begin1 + tl.arange(0, SAMPLES1), begin2 + tl.arange(0, SAMPLES2)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    of_row, of_column = begin1 + row // PAIR1, begin2 + column // PAIR2
    zero = tl.zeros((BLOCK_M, BLOCK_N), dtype=p_out.dtype.element_ty)
    if SINGLE:
        inner = rows_product(p_a1, p_a2, sample1, sample2, sample1 < n1, sample2 < n2, i_size, zero, BLOCK_C, PRECISION)
        mask = (sample1 < n1)[:, None] & (sample2 < n2)[None, :]
        for k in range(0, k1):
            for m in range(0, k2):
                left, right = sample1 * k1 + k, sample2 * k2 + m
                outer = rows_product(
                    p_g1, p_g2, left, right, sample1 < n1, sample2 < n2, o_size, zero, BLOCK_C, PRECISION
                )
                to = p_out + (begin1 * k1 + k) * width + begin2 * k2 + m  # few registers: offsets within the tile
                to += (row * k1).to(tl.int64)[:, None] * width + (column * k2)[None, :]
                tl.store(to, inner * outer, mask=mask)
    else:
        across = tl.cdiv(k2, PAIR2)
        k, m = chunk // across * PAIR1 + row % PAIR1, chunk % across * PAIR2 + column % PAIR2
        m_row, m_column = (of_row < n1) & (k < k1), (of_column < n2) & (m < k2)
        left, right = of_row * k1 + k, of_column * k2 + m
        total = zero
        none = tl.zeros((SAMPLES1, SAMPLES2), dtype=p_out.dtype.element_ty)
        for s in range(0, s1):
            for t in range(0, s2):
                inner = rows_product(
                    p_a1, p_a2, sample1 * s1 + s, sample2 * s2 + t, sample1 < n1, sample2 < n2, i_size, none,
                    BLOCK_C, PRECISION,
                )  # fmt: skip
                if PAIR1 * PAIR2 > 1:
                    inner = tl.broadcast_to(inner[:, None, :, None], (SAMPLES1, PAIR1, SAMPLES2, PAIR2))
                    inner = tl.reshape(inner, (BLOCK_M, BLOCK_N))
                outer = rows_product(
                    p_g1, p_g2, left * s1 + s, right * s2 + t, m_row, m_column, o_size, zero, BLOCK_C, PRECISION
                )
                total += inner * outer
        tl.store(p_out + left[:, None] * width + right[None, :], total, mask=m_row[:, None] & m_column[None, :])


# rows and columns of a tile, depth of a product, warps, stages; by (dtype, TF32), for one pair of outputs at one
# position and for several, which keep more in registers
_HALF = (128, 128, 64, 8, 4), (128, 64, 64, 8, 4)
BLOCKS = {
    (torch.float64, "ieee"): ((64, 64, 16, 8, 2), (64, 32, 16, 8, 2)),
    (torch.float32, "ieee"): ((64, 64, 16, 8, 3), (64, 64, 16, 8, 3)),
    (torch.float32, "tf32"): ((128, 128, 32, 8, 4), (128, 64, 32, 8, 4)),
    (torch.bfloat16, "ieee"): _HALF,
    (torch.float16, "ieee"): _HALF,
}
PAIRS = (1, 2, 4)


def pairs(k1: int, k2: int, i: int, o: int) -> tuple[int, int]:
    """Outputs of each side in one tile: the fewest operations per pair of samples and positions."""

    def operations(pair: tuple[int, int]) -> int:
        p, q = pair
        return -(-k1 // p) * -(-k2 // q) * (p * q * o + i)

    return min(((p, q) for p in PAIRS for q in PAIRS), key=operations)


def _plan(a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor) -> tuple:
    (n1, k1, s1, o), (n2, k2, s2, _), i = g1.shape, g2.shape, a1.shape[2]
    kind = precision(a1.dtype)
    single = s1 == 1 and s2 == 1
    blocks = BLOCKS[a1.dtype, kind][0 if single and k1 * k2 == 1 else 1]
    p, q = (1, 1) if single else pairs(k1, k2, i, o)
    programs = -(-n1 // (blocks[0] // p)) * -(-n2 // (blocks[1] // q))
    return programs * (1 if single else -(-k1 // p) * -(-k2 // q)), blocks, p, q, single, kind


def ntk_gram(a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor) -> Tensor:
    """See the op of the same name."""
    (n1, k1, s1, o), (n2, k2, s2, _), i = g1.shape, g2.shape, a1.shape[2]
    out = a1.new_empty(n1 * k1, n2 * k2, dtype=wide_dtype(a1.dtype))
    if out.numel() == 0:
        return out
    a1, g1, a2, g2 = (dense(x) for x in (a1, g1, a2, g2))
    programs, (block_m, block_n, block_c, warps, stages), p, q, single, kind = _plan(a1, g1, a2, g2)
    with torch.cuda.device_of(a1):
        gram_kernel[(programs,)](
            a1, g1, a2, g2, out, n1, n2, k1, k2, s1, s2, i, o, n2 * k2,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c, PAIR1=p, PAIR2=q, SINGLE=single, PRECISION=kind,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def refuse_ntk_gram(a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor) -> str | None:
    """Why this call is not for the kernel, or None."""
    reason = refuse(a1)
    if reason is not None:
        return reason
    (_, k1, s1, o), (_, k2, s2, _), i = g1.shape, g2.shape, a1.shape[2]
    faster = 1 if wide_dtype(a1.dtype) == a1.dtype else 8  # products of halves against the body's float32
    if s1 * s2 > 1 and faster * o * i <= s1 * s2 * (o + i / max(k1 * k2, 1) + 2):
        return "with so many positions the rows [o, i] take fewer operations; the body forms them"
    return refuse_programs(_plan(a1, g1, a2, g2)[0])
