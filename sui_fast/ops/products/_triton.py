"""Triton kernels of jvp and vjp: matrix products whose reductions are fused, without an [n, s, r, o] intermediate.

jvp. A tile of positions times a block of tangents[r]^T stands in registers, is multiplied by g for one output after the
other and summed over o and over the positions of a sample. Programs that share a sample or split o write partial sums,
which are added in a fixed order.

vjp. A block of out[r] sums over tiles of positions the product of a with sum_k c g, formed in registers. That sum has
24 bits: half precision takes it in parts that the tensor cores hold exactly, so the result is that of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import FILL, dense, grouped, precision, product, refuse, refuse_programs, rows_product, split
from .._register import wide_dtype


# jvp ------------------------------------------------------------------------------------------------------------------
@triton.jit
def jvp_kernel(
    p_a, p_g, p_t, p_out,
    n, k, s, i_size, o_size, r, n_tiles, s_tiles, o_tiles, o_span,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    OUTPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SAMPLES: tl.constexpr = BLOCK_P // BLOCK_S
    kind = p_out.dtype.element_ty
    # 64-bit indices; tiles of samples go first: programs that run together read the same tangents
    tile = tl.program_id(0).to(tl.int64)
    begin_n = tile % n_tiles * SAMPLES
    tile = tile // n_tiles
    part = tile % (s_tiles * o_tiles)
    begin_s, begin_o = part // o_tiles * BLOCK_S, part % o_tiles * o_span
    tile = tile // (s_tiles * o_tiles)
    direction, begin_k = tile % r, tile // r * OUTPUTS
    local = tl.arange(0, BLOCK_P)
    sample, place = begin_n + local // BLOCK_S, begin_s + local % BLOCK_S
    inside = (sample < n) & (place < s)
    output = tl.arange(0, OUTPUTS)
    outputs = tl.minimum(k - begin_k, OUTPUTS).to(tl.int32)
    total = tl.zeros((BLOCK_P, OUTPUTS), dtype=kind)
    zero = tl.zeros((BLOCK_P, BLOCK_O), dtype=kind)
    column = tl.arange(0, BLOCK_O)
    for step in range(0, o_span, BLOCK_O):
        o = begin_o + step + column
        m_o = o < o_size
        moved = rows_product(
            p_a, p_t, sample * s + place, direction * o_size + o, inside, m_o, i_size, zero, BLOCK_C, PRECISION
        )
        for j in range(0, outputs):
            m_g = inside[:, None] & m_o[None, :]
            from_g = p_g + (((sample * k + begin_k + j) * s + place) * o_size + begin_o + step)[:, None]
            g = tl.load(from_g + column[None, :], mask=m_g, other=0.0)
            total += tl.where(output[None, :] == j, tl.sum(moved * g.to(kind), 1)[:, None], 0.0)
    total = tl.sum(tl.reshape(total, (SAMPLES, BLOCK_S, OUTPUTS)), 1)
    sample, output = begin_n + tl.arange(0, SAMPLES), begin_k + output
    to = ((part * n + sample)[:, None] * k + output[None, :]) * r + direction
    tl.store(p_out + to, total, mask=(sample < n)[:, None] & (output < k)[None, :])


# positions and o of a tile, depth of a product, warps, stages; by (dtype, TF32)
_HALF = (128, 128, 64, 8, 4)
JVP_BLOCKS = {
    (torch.float64, "ieee"): (64, 64, 16, 8, 2),
    (torch.float32, "ieee"): (64, 64, 16, 8, 3),
    (torch.float32, "tf32"): (128, 64, 32, 8, 4),
    (torch.bfloat16, "ieee"): _HALF,
    (torch.float16, "ieee"): _HALF,
}
OUTPUTS = (1, 4, 16)  # of one program; more outputs repeat the products


def _jvp_plan(a: Tensor, g: Tensor, r: int) -> tuple:
    n, k, s, o = g.shape
    kind = precision(a.dtype)
    blocks = JVP_BLOCKS[a.dtype, kind]
    sizes = [1 << e for e in range(blocks[0].bit_length())]  # of one sample in a tile, at most a sixth of it empty
    block_s = max(p for p in sizes if p == 1 or -(-s // p) * p <= s + s // 6)
    outputs = next((c for c in OUTPUTS if c >= k), OUTPUTS[-1])
    n_tiles, s_tiles = -(-n // (blocks[0] // block_s)), -(-s // block_s)
    programs = n_tiles * s_tiles * r * -(-k // outputs)
    o_blocks = -(-o // blocks[1])
    o_span = -(-o_blocks // min(o_blocks, -(-FILL // programs))) * blocks[1]
    o_tiles = -(-o // o_span)
    return programs * o_tiles, blocks, block_s, outputs, (n_tiles, s_tiles, o_tiles, o_span), kind


def jvp(a: Tensor, g: Tensor, tangents: Tensor) -> Tensor:
    """See the op of the same name."""
    (n, k, s, o), i, r = g.shape, a.shape[2], len(tangents)
    wide = wide_dtype(a.dtype)
    if 0 in (n, k, s, o, i, r):
        return a.new_zeros(n, k, r, dtype=wide)
    a, g, tangents = dense(a), dense(g), dense(tangents)
    programs, (block_p, block_o, block_c, warps, stages), block_s, outputs, spans, kind = _jvp_plan(a, g, r)
    out = a.new_empty(spans[1] * spans[2], n, k, r, dtype=wide)
    with torch.cuda.device_of(a):
        jvp_kernel[(programs,)](
            a, g, tangents, out, n, k, s, i, o, r, *spans,
            BLOCK_P=block_p, BLOCK_S=block_s, BLOCK_O=block_o, BLOCK_C=block_c, OUTPUTS=outputs, PRECISION=kind,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out.sum(0) if len(out) > 1 else out[0]


def refuse_jvp(a: Tensor, g: Tensor, tangents: Tensor) -> str | None:
    """Why this call is not for the kernel, or None."""
    reason = refuse(a)
    if reason is not None or 0 in (*a.shape, *g.shape, *tangents.shape):
        return reason
    return refuse_programs(_jvp_plan(a, g, len(tangents))[0])


# vjp ------------------------------------------------------------------------------------------------------------------
@triton.jit
def pull(from_c, from_g, o, m_p, m_o, kind: tl.constexpr):
    """c g of one output: [positions, o]."""
    c = tl.load(from_c, mask=m_p, other=0.0)
    g = tl.load(from_g[:, None] + o[None, :], mask=m_p[:, None] & m_o[None, :], other=0.0)
    return c.to(kind)[:, None] * g.to(kind)


@triton.jit
def vjp_kernel(
    p_a, p_g, p_c, p_out,
    positions, k, s, i_size, o_size, r, pitch, i_tiles, o_tiles, span,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, OUTPUTS: tl.constexpr, ALL: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = p_out.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    i_tile, o_tile = grouped(tile % (i_tiles * o_tiles), i_tiles, o_tiles, 8)
    tile = tile // (i_tiles * o_tiles)
    direction, part = tile % r, tile // r
    i, o = i_tile * BLOCK_I + tl.arange(0, BLOCK_I), o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    m_i, m_o = i < i_size, o < o_size
    total = tl.zeros((BLOCK_I, BLOCK_O), dtype=kind)
    for step in range(0, span, BLOCK_P):
        position = part * span + step + tl.arange(0, BLOCK_P)
        m_p = position < positions
        sample, place = position // s, position % s
        of_a = position[:, None] * i_size + i[None, :]
        x = tl.trans(tl.load(p_a + of_a, mask=m_p[:, None] & m_i[None, :], other=0.0))
        pulled = tl.zeros((BLOCK_P, BLOCK_O), dtype=kind)
        from_c, from_g = p_c + sample * k * r + direction, p_g + (sample * k * s + place) * o_size
        if ALL:  # without an inner loop the loads of the next positions run ahead of the products
            for _ in tl.static_range(OUTPUTS):
                pulled += pull(from_c, from_g, o, m_p, m_o, kind)
                from_c, from_g = from_c + r, from_g + pitch
        else:
            for first in range(0, k, OUTPUTS):
                for j in tl.static_range(OUTPUTS):
                    m_j = position < tl.where(first + j < k, positions, 0)
                    pulled += pull(from_c, from_g, o, m_j, m_o, kind)
                    from_c, from_g = from_c + r, from_g + pitch
        if PARTS == 0:
            total = product(x.to(kind), pulled, total, PRECISION)
        else:
            for _ in tl.static_range(PARTS):
                held, pulled = split(pulled)
                total = product(x, held, total, PRECISION)
    to = (direction + part * r) * o_size * i_size + o[None, :] * i_size + i[:, None]
    tl.store(p_out + to, total, mask=m_i[:, None] & m_o[None, :])


# i and o of a tile, positions of a product, warps, stages; by (dtype, TF32), for one output and for several, whose g
# needs room. float16 takes three products in TF32
_FULL, _SINGLE, _TF32 = (64, 64, 16, 8, 2), (64, 64, 16, 8, 3), (128, 64, 32, 8, 3)
VJP_BLOCKS = {
    (torch.float64, "ieee"): (_FULL, _FULL),
    (torch.float32, "ieee"): (_SINGLE, _SINGLE),
    (torch.float32, "tf32"): (_TF32, _TF32),
    (torch.bfloat16, "ieee"): ((128, 128, 32, 8, 3), (128, 64, 32, 8, 3)),
    (torch.float16, "tf32x3"): (_TF32, _TF32),
}
AT_ONCE = 4  # outputs whose g is loaded together


def _vjp_plan(a: Tensor, k: int, o: int, r: int) -> tuple:
    n, s, i = a.shape
    kind = "tf32x3" if a.dtype == torch.float16 else precision(a.dtype)
    blocks = VJP_BLOCKS[a.dtype, kind][k > 1]
    i_tiles, o_tiles = -(-i // blocks[0]), -(-o // blocks[1])
    programs, steps = i_tiles * o_tiles * r, -(-n * s // blocks[2])
    span = -(-steps // min(-(-steps // 8), -(-FILL // programs))) * blocks[2]
    parts = -(-n * s // span)
    pieces = 0 if a.dtype != torch.bfloat16 else 2 if k == 1 else 3  # the product of two bfloat16 fits in two
    return programs * parts, blocks, (i_tiles, o_tiles, span), parts, pieces, kind


def vjp(a: Tensor, g: Tensor, cotangents: Tensor) -> Tensor:
    """See the op of the same name."""
    (n, k, s, o), i, r = g.shape, a.shape[2], cotangents.shape[2]
    wide = wide_dtype(a.dtype)
    if 0 in (n, k, s, o, i, r):
        return a.new_zeros(r, o, i, dtype=wide)
    a, g, cotangents = dense(a), dense(g), dense(cotangents)
    programs, (block_i, block_o, block_p, warps, stages), spans, parts, pieces, kind = _vjp_plan(a, k, o, r)
    out = a.new_empty(parts, r, o, i, dtype=wide)
    with torch.cuda.device_of(a):
        vjp_kernel[(programs,)](
            a, g, cotangents, out, n * s, k, s, i, o, r, s * o, *spans,
            BLOCK_I=block_i, BLOCK_O=block_o, BLOCK_P=block_p, OUTPUTS=min(k, AT_ONCE), ALL=k <= AT_ONCE,
            PARTS=pieces, PRECISION=kind, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out.sum(0) if parts > 1 else out[0]


def refuse_vjp(a: Tensor, g: Tensor, cotangents: Tensor) -> str | None:
    """Why this call is not for the kernel, or None."""
    reason = refuse(a)
    if reason is not None or 0 in (*a.shape, *g.shape, *cotangents.shape):
        return reason
    return refuse_programs(_vjp_plan(a, g.shape[1], g.shape[3], cotangents.shape[2])[0])
