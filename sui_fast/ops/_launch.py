"""Shared by the Triton kernels: products as exact as their accumulator, order of tiles, refusals.

No GPU has run the kernels yet; the interpreter and the compiler for sm_80 and sm_90 have.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._backends import interpreted

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOST_PROGRAMS = 2**31 - 1  # of a launch, along the first axis
FILL = 264  # programs that keep a large GPU busy: two for each of 132 multiprocessors
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right."""
    if _INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        left, right = left.to(total.dtype), right.to(total.dtype)
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def split(x):
    """The part of a float32 that a bfloat16 holds, and the rest; three parts hold all 24 bits."""
    part = x.to(tl.bfloat16)
    return part, x - part.to(tl.float32)


@triton.jit
def rows_product(
    p_left, p_right, left, right, m_left, m_right, size, total, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """total + rows ``left`` of one matrix times rows ``right`` of another, both [., size]."""
    inside = tl.arange(0, BLOCK_C)
    from_left = p_left + left[:, None] * size + inside[None, :]
    from_right = p_right + right[None, :] * size + inside[:, None]
    for begin in range(0, size, BLOCK_C):
        m_inside = inside < size - begin
        x = tl.load(from_left + begin, mask=m_left[:, None] & m_inside[None, :], other=0.0)
        y = tl.load(from_right + begin, mask=m_right[None, :] & m_inside[:, None], other=0.0)
        total = product(x, y, total, PRECISION)
    return total


@triton.jit
def grouped(tile, n_rows, n_columns, GROUP: tl.constexpr):
    """(row, column) of a tile; GROUP rows go column by column, so that what they read stays in the second cache."""
    first = tile // (GROUP * n_columns) * GROUP
    height = tl.minimum(n_rows - first, GROUP)
    inside = tile % (GROUP * n_columns)
    return first + inside % height, inside // height


def precision(dtype: torch.dtype) -> str:
    """TF32 where float32 products were allowed to use it, else the dtype's own precision."""
    if dtype != torch.float32:
        return "ieee"
    try:
        allowed = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set through the newer interface alone
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def dense(x: Tensor) -> Tensor:
    return x.detach().resolve_conj().resolve_neg().contiguous()


def refuse(x: Tensor, dtypes: tuple = FLOATS) -> str | None:
    """Why a tensor is not for a Triton kernel, or None."""
    if x.device.type != "cuda" and not interpreted():
        return f"the tensors are on {x.device}; it takes CUDA tensors"
    if x.dtype not in dtypes:
        return f"the tensors are {x.dtype}; it takes {', '.join(map(str, dtypes))}"
    return None


def refuse_programs(count: int) -> str | None:
    return "more tiles than a launch grid holds" if count > MOST_PROGRAMS else None
