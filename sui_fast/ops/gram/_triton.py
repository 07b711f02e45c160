"""Triton kernel of ntk_gram.

    result[(n, k), (m, l)] = sum_{s, t} (a1[n, s] . a2[m, t]) (g1[n, k, s] . g2[m, l, t])

One program makes one tile of the result. For every pair of positions both products stand in registers, are multiplied
there and added up; the tile is written once, and nothing of size (n s)^2 ever exists. No GPU has run it yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import interpreted
from .._register import wide_dtype


@triton.jit
def gram_kernel(
    p_a1, p_g1, p_a2, p_g2, p_out,
    n_rows, n_columns, k1, k2, s1, s2, i_size, o_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    # 64-bit indices: rows x positions x layer size passes 2^31 long before memory ends
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = row < n_rows
    m_column = column < n_columns
    sample1 = row // k1
    sample2 = column // k2
    inside = tl.arange(0, BLOCK_C)
    kind = tl.float64 if DOUBLE else tl.float32
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=kind)
    for s in range(0, s1):
        for t in range(0, s2):
            inner = tl.zeros((BLOCK_M, BLOCK_N), dtype=kind)
            for begin in range(0, i_size, BLOCK_C):
                c = begin + inside
                o_left = (sample1 * s1 + s)[:, None] * i_size + c[None, :]
                o_right = (sample2 * s2 + t)[None, :] * i_size + c[:, None]
                left = tl.load(p_a1 + o_left, mask=m_row[:, None] & (c < i_size)[None, :], other=0.0)
                right = tl.load(p_a2 + o_right, mask=m_column[None, :] & (c < i_size)[:, None], other=0.0)
                if DOUBLE:  # no float64 dot on every target: a broadcast product and a sum
                    inner += tl.sum(left[:, :, None] * right[None, :, :], 1)
                else:
                    inner += tl.dot(left, right, input_precision="ieee")
            outer = tl.zeros((BLOCK_M, BLOCK_N), dtype=kind)
            for begin in range(0, o_size, BLOCK_C):
                c = begin + inside
                o_left = (row * s1 + s)[:, None] * o_size + c[None, :]
                o_right = (column * s2 + t)[None, :] * o_size + c[:, None]
                left = tl.load(p_g1 + o_left, mask=m_row[:, None] & (c < o_size)[None, :], other=0.0)
                right = tl.load(p_g2 + o_right, mask=m_column[None, :] & (c < o_size)[:, None], other=0.0)
                if DOUBLE:
                    outer += tl.sum(left[:, :, None] * right[None, :, :], 1)
                else:
                    outer += tl.dot(left, right, input_precision="ieee")
            total += inner * outer
    place = row[:, None] * n_columns + column[None, :]
    tl.store(p_out + place, total, mask=m_row[:, None] & m_column[None, :])


# tile rows, columns, depth of a product and warps: float64 tiles hold a broadcast product in registers
BLOCKS = {
    torch.float64: (16, 16, 16, 4),
    torch.float32: (64, 64, 32, 4),
    torch.bfloat16: (128, 64, 64, 4),
    torch.float16: (128, 64, 64, 4),
}


def ntk_gram(a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor) -> Tensor:
    """See the op of the same name."""
    (n1, k1, s1, o), (n2, k2, s2, _), i = g1.shape, g2.shape, a1.shape[2]
    out = a1.new_empty(n1 * k1, n2 * k2, dtype=wide_dtype(a1.dtype))
    if out.numel() == 0:
        return out
    a1, g1, a2, g2 = (x.contiguous() for x in (a1, g1, a2, g2))
    block_m, block_n, block_c, warps = BLOCKS[a1.dtype]
    grid = (triton.cdiv(n1 * k1, block_m), triton.cdiv(n2 * k2, block_n))
    with torch.cuda.device_of(a1):
        gram_kernel[grid](
            a1, g1, a2, g2, out,
            n1 * k1, n2 * k2, k1, k2, s1, s2, i, o,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c, DOUBLE=a1.dtype == torch.float64, num_warps=warps,
        )  # fmt: skip
    return out


def refuse_ntk_gram(a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor) -> str | None:
    """Why this call is not for the kernel, or None."""
    if a1.device.type != "cuda" and not interpreted():
        return f"the tensors are on {a1.device}; it takes CUDA tensors"
    if a1.dtype not in BLOCKS:
        return f"the tensors are {a1.dtype}; it takes {', '.join(map(str, BLOCKS))}"
    if -(-g2.shape[0] * g2.shape[1] // BLOCKS[a1.dtype][1]) > 65535:
        return "more columns than a launch grid holds"
    return None
