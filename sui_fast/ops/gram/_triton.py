"""Triton kernels of ntk_gram and ntk_gram_sum.

    result[(n, k), (m, l)] = sum_layers sum_{s, t} (a1[n, s] . a2[m, t] + bias) (g1[n, k, s] . g2[m, l, t])

A tile of the result covers some samples on each side. Both products stand in registers, are multiplied there and added
up; nothing of size (n s)^2 ever exists.

One layer at one position: the products of the a are made once, then one pair of outputs after the other is multiplied
and written. Else the sums must stay in registers, over positions and layers, so a tile holds PAIR1 x PAIR2 pairs of
outputs of fewer samples; the products of the a are made once for those and repeated for the next. ``pairs`` chooses the
fewest operations. One output on each side repeats nothing in either case.

Several layers are one launch: a table on the device has the addresses and sizes of each, and the tile is written once.
Lines are padded to 16 bytes before, so that those of every layer may be loaded in vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import dense, grouped, precision, refuse, refuse_programs, rows_product
from .._register import wide_dtype
from . import long_product, rows_are_fewer, rows_of


@triton.jit
def add_positions(
    total, p_a1, p_g1, p_a2, p_g2, s1, s2, i_size, o_size, bias,
    sample1, sample2, m_sample1, m_sample2, left, right, m_row, m_column,
    BLOCK_C: tl.constexpr, PAIR1: tl.constexpr, PAIR2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + the sum over all positions of one layer; left, right: numbers of (sample, output)."""
    BLOCK_M: tl.constexpr = left.shape[0]
    BLOCK_N: tl.constexpr = right.shape[0]
    SAMPLES1: tl.constexpr = sample1.shape[0]
    SAMPLES2: tl.constexpr = sample2.shape[0]
    for s in range(0, s1):
        for t in range(0, s2):
            inner = rows_product(
                p_a1, p_a2, sample1 * s1 + s, sample2 * s2 + t, m_sample1, m_sample2, i_size,
                tl.zeros((SAMPLES1, SAMPLES2), dtype=total.dtype), BLOCK_C, PRECISION,
            )  # fmt: skip
            inner += bias
            if PAIR1 * PAIR2 > 1:
                inner = tl.broadcast_to(inner[:, None, :, None], (SAMPLES1, PAIR1, SAMPLES2, PAIR2))
                inner = tl.reshape(inner, (BLOCK_M, BLOCK_N))
            outer = rows_product(
                p_g1, p_g2, left * s1 + s, right * s2 + t, m_row, m_column, o_size,
                tl.zeros((BLOCK_M, BLOCK_N), dtype=total.dtype), BLOCK_C, PRECISION,
            )  # fmt: skip
            total += inner * outer
    return total


@triton.jit
def tile_of(n1, n2, SAMPLES1: tl.constexpr, SAMPLES2: tl.constexpr):
    """First samples of this program's tile, and the number of its pairs of outputs, 64 bits each."""
    # rows x positions x layer size passes 2^31 long before memory ends
    tile = tl.program_id(0).to(tl.int64)
    n_rows, n_columns = tl.cdiv(n1, SAMPLES1), tl.cdiv(n2, SAMPLES2)
    first, second = grouped(tile % (n_rows * n_columns), n_rows, n_columns, 8)
    return first * SAMPLES1, second * SAMPLES2, tile // (n_rows * n_columns)


@triton.jit
def lines_of_pairs(begin, chunk, n, k, BLOCK: tl.constexpr, PAIR: tl.constexpr):
    """(sample, output) numbers of a tile's lines, PAIR outputs of each sample, and which of them exist."""
    line = tl.arange(0, BLOCK)
    sample, output = begin + line // PAIR, chunk * PAIR + line % PAIR
    return sample * k + output, (sample < n) & (output < k)


@triton.jit
def gram_kernel(
    p_a1, p_g1, p_a2, p_g2, p_out,
    n1, n2, k1, k2, s1, s2, i_size, o_size, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PAIR1: tl.constexpr, PAIR2: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SAMPLES1: tl.constexpr = BLOCK_M // PAIR1
    SAMPLES2: tl.constexpr = BLOCK_N // PAIR2
    begin1, begin2, chunk = tile_of(n1, n2, SAMPLES1, SAMPLES2)
    sample1, sample2 = begin1 + tl.arange(0, SAMPLES1), begin2 + tl.arange(0, SAMPLES2)
    m_sample1, m_sample2 = sample1 < n1, sample2 < n2
    zero = tl.zeros((BLOCK_M, BLOCK_N), dtype=p_out.dtype.element_ty)
    if SINGLE:
        inner = rows_product(p_a1, p_a2, sample1, sample2, m_sample1, m_sample2, i_size, zero, BLOCK_C, PRECISION)
        mask = m_sample1[:, None] & m_sample2[None, :]
        for k in range(0, k1):
            for m in range(0, k2):
                left, right = sample1 * k1 + k, sample2 * k2 + m
                outer = rows_product(p_g1, p_g2, left, right, m_sample1, m_sample2, o_size, zero, BLOCK_C, PRECISION)
                to = p_out + (begin1 * k1 + k) * width + begin2 * k2 + m  # few registers: offsets within the tile
                row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
                to += (row * k1).to(tl.int64)[:, None] * width + (column * k2)[None, :]
                tl.store(to, inner * outer, mask=mask)
    else:
        across = tl.cdiv(k2, PAIR2)
        left, m_row = lines_of_pairs(begin1, chunk // across, n1, k1, BLOCK_M, PAIR1)
        right, m_column = lines_of_pairs(begin2, chunk % across, n2, k2, BLOCK_N, PAIR2)
        total = add_positions(
            zero, p_a1, p_g1, p_a2, p_g2, s1, s2, i_size, o_size, 0.0,
            sample1, sample2, m_sample1, m_sample2, left, right, m_row, m_column, BLOCK_C, PAIR1, PAIR2, PRECISION,
        )  # fmt: skip
        tl.store(p_out + left[:, None] * width + right[None, :], total, mask=m_row[:, None] & m_column[None, :])


COLUMNS = tl.constexpr(9)  # of the table: addresses of a1, g1, a2, g2; s1, s2, i, o, bias


@triton.jit
def gram_sum_kernel(
    p_table, p_like, p_out,
    layers, n1, n2, k1, k2, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PAIR1: tl.constexpr, PAIR2: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SAMPLES1: tl.constexpr = BLOCK_M // PAIR1
    SAMPLES2: tl.constexpr = BLOCK_N // PAIR2
    begin1, begin2, chunk = tile_of(n1, n2, SAMPLES1, SAMPLES2)
    sample1, sample2 = begin1 + tl.arange(0, SAMPLES1), begin2 + tl.arange(0, SAMPLES2)
    across = tl.cdiv(k2, PAIR2)
    left, m_row = lines_of_pairs(begin1, chunk // across, n1, k1, BLOCK_M, PAIR1)
    right, m_column = lines_of_pairs(begin2, chunk % across, n2, k2, BLOCK_N, PAIR2)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=p_out.dtype.element_ty)
    for layer in range(0, layers):
        at = p_table + layer * COLUMNS
        p_a1 = tl.multiple_of(tl.load(at).to(p_like.dtype), 16)
        p_g1 = tl.multiple_of(tl.load(at + 1).to(p_like.dtype), 16)
        p_a2 = tl.multiple_of(tl.load(at + 2).to(p_like.dtype), 16)
        p_g2 = tl.multiple_of(tl.load(at + 3).to(p_like.dtype), 16)
        s1, s2 = tl.load(at + 4).to(tl.int32), tl.load(at + 5).to(tl.int32)
        i_size = tl.multiple_of(tl.load(at + 6).to(tl.int32), ALIGNED)
        o_size = tl.multiple_of(tl.load(at + 7).to(tl.int32), ALIGNED)
        total = add_positions(
            total, p_a1, p_g1, p_a2, p_g2, s1, s2, i_size, o_size, tl.load(at + 8).to(total.dtype),
            sample1, sample2, sample1 < n1, sample2 < n2, left, right, m_row, m_column,
            BLOCK_C, PAIR1, PAIR2, PRECISION,
        )  # fmt: skip
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
SUM_BLOCKS = {  # the same for several layers, whose sum is kept beside both products
    (torch.float64, "ieee"): (64, 32, 16, 8, 2),
    (torch.float32, "ieee"): (64, 64, 16, 8, 3),
    (torch.float32, "tf32"): (128, 64, 32, 8, 3),
    (torch.bfloat16, "ieee"): (128, 64, 64, 8, 4),
    (torch.float16, "ieee"): (128, 64, 64, 8, 4),
}
PAIRS = (1, 2, 4)
_ONCE_MORE = 500  # operations that adding to one number of the result in memory is worth


def pairs(k1: int, k2: int, layers: list[tuple[int, int, int]]) -> tuple[tuple[int, int], list[int]]:
    """Outputs of each side in one tile, with the fewest operations, and those of every layer (positions, i, o)."""

    def operations(pair: tuple[int, int]) -> list[int]:
        p, q = pair
        return [s * -(-k1 // p) * -(-k2 // q) * (p * q * o + i) for s, i, o in layers]

    best = min(((p, q) for p in PAIRS for q in PAIRS), key=lambda pair: sum(operations(pair)))
    return best, operations(best)


def _plan(a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor) -> tuple:
    (n1, k1, s1, o), (n2, k2, s2, _), i = g1.shape, g2.shape, a1.shape[2]
    kind = precision(a1.dtype)
    single = s1 == 1 and s2 == 1
    blocks = BLOCKS[a1.dtype, kind][0 if single and k1 * k2 == 1 else 1]
    p, q = (1, 1) if single else pairs(k1, k2, [(1, i, o)])[0]
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
    if _forms_rows(a1, g1, a2, g2):
        return _ROWS
    return refuse_programs(_plan(a1, g1, a2, g2)[0])


_ROWS = "with so many positions the rows [o, i] take fewer operations; the body forms them"


def _forms_rows(a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor) -> bool:
    half = wide_dtype(a1.dtype) != a1.dtype  # their products are faster than the body's in float32
    return rows_are_fewer(g1, g2, a1.shape[2], 8 if half else 1)


# Several layers -------------------------------------------------------------------------------------------------------
def _lines(x: Tensor) -> Tensor:
    """The same with zeros at the ends of its lines, which begin at multiples of 16 bytes."""
    x = dense(torch.nn.functional.pad(x.detach(), (0, -x.shape[-1] % (16 // x.element_size()))))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _layers(a1: list, g1: list, a2: list, g2: list) -> tuple[tuple[int, int], list[int], list[int], list[int]]:
    """Outputs in a tile; the layers of the launch, those with a launch of their own, those that form rows."""
    every = range(len(a1))
    rows = [j for j in every if _forms_rows(a1[j], g1[j], a2[j], g2[j])]
    together = [j for j in every if j not in rows]
    k1, k2 = g1[0].shape[1], g2[0].shape[1]
    sizes = [(a1[j].shape[1] * a2[j].shape[1], a1[j].shape[2], g1[j].shape[3]) for j in together]
    pair, operations = pairs(k1, k2, sizes)
    apart = [  # one position and many outputs: the products of a, made once, outweigh another pass over the result
        j
        for j, (s, i, o), count in zip(together, sizes, operations, strict=True)
        if s == 1 and count > k1 * k2 * (o + _ONCE_MORE) + i
    ]
    return pair, [j for j in together if j not in apart], apart, rows


def _sum_programs(shape: tuple[int, int, int, int], pair: tuple[int, int], blocks: tuple) -> int:
    (n1, k1, n2, k2), (p, q) = shape, pair
    return -(-n1 // (blocks[0] // p)) * -(-n2 // (blocks[1] // q)) * -(-k1 // p) * -(-k2 // q)


def ntk_gram_sum(a1: list[Tensor], g1: list[Tensor], a2: list[Tensor], g2: list[Tensor], bias: list[bool]) -> Tensor:
    """See the op of the same name."""
    (n1, k1), (n2, k2), first = g1[0].shape[:2], g2[0].shape[:2], a1[0]
    out = first.new_empty(n1 * k1, n2 * k2, dtype=wide_dtype(first.dtype))
    if out.numel() == 0:
        return out
    pair, together, apart, rows = _layers(a1, g1, a2, g2)
    if together:
        _launch_sum([[_lines(x[j]) for x in (a1, g1, a2, g2)] + [bias[j]] for j in together], pair, out)
    else:
        out.zero_()
    for j in (*apart, *rows):
        x, y = ((torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2) if bias[j] else a) for a in (a1[j], a2[j]))
        if j in rows:
            x, left, y, right = (t.detach().to(out.dtype) for t in (x, g1[j], y, g2[j]))
            out += long_product(rows_of(x, left), rows_of(y, right))
        else:
            out += ntk_gram(x, g1[j], y, g2[j])
    return out


def _launch_sum(layers: list[list], pair: tuple[int, int], out: Tensor) -> None:
    a1, g1, a2, g2, _ = layers[0]
    shape = (*g1.shape[:2], *g2.shape[:2])
    kind = precision(a1.dtype)
    block_m, block_n, block_c, warps, stages = blocks = SUM_BLOCKS[a1.dtype, kind]
    table = [
        [*(x.data_ptr() for x in (a1, g1, a2, g2)), a1.shape[1], a2.shape[1], a1.shape[2], g1.shape[3], int(ones)]
        for a1, g1, a2, g2, ones in layers
    ]
    with torch.cuda.device_of(out):
        gram_sum_kernel[(_sum_programs(shape, pair, blocks),)](
            torch.tensor(table, dtype=torch.int64, device=out.device), a1, out,
            len(layers), shape[0], shape[2], shape[1], shape[3], shape[2] * shape[3],
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c, PAIR1=pair[0], PAIR2=pair[1],
            ALIGNED=16 // a1.element_size(), PRECISION=kind, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def refuse_ntk_gram_sum(
    a1: list[Tensor], g1: list[Tensor], a2: list[Tensor], g2: list[Tensor], bias: list[bool]
) -> str | None:
    """Why this call is not for the kernel, or None."""
    reason = refuse(a1[0])
    if reason is not None:
        return reason
    pair, together, apart, _ = _layers(a1, g1, a2, g2)
    if not together and not apart:
        return _ROWS
    shape = (*g1[0].shape[:2], *g2[0].shape[:2])
    programs = [_sum_programs(shape, pair, SUM_BLOCKS[a1[0].dtype, precision(a1[0].dtype)])]
    programs += [_plan(a1[j], g1[j], a2[j], g2[j])[0] for j in apart]
    return refuse_programs(max(programs))
