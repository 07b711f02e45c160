"""C++ kernels of block leave-one-out (csrc/cpu/removal.cpp): pointers out, dense float64 results back."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu
from . import missed_by

_LARGE = 1 << 20  # numbers of a result, beyond which the system clears fresh memory for every one


def converged_removal(
    u: Tensor, s: Tensor, g: Tensor, rest: Tensor, null: Tensor, shift: float
) -> tuple[Tensor, Tensor]:
    """See the op of the same name."""
    blocks, m, r = u.shape
    arrays = [_dense(x) for x in (u, s, g, rest, null)]
    v, coef = s.new_empty(blocks, m), _result(blocks, r)
    singular = _cpu.converged_removal(
        *_block(arrays[0]),
        *(x.data_ptr() for x in arrays[1:]),
        shift,
        v.data_ptr(),
        coef.data_ptr(),
        torch.get_num_threads(),
    )
    _check_solved(singular, blocks)
    return v, coef


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
    blocks, _, r = u.shape
    arrays = [_dense(x) for x in (u, s, g, rest, null, r0, poles, residues)]
    coef = _result(blocks, r)
    singular = _cpu.rational_removal(
        *_block(arrays[0]),
        *(x.data_ptr() for x in arrays[1:6]),
        len(poles),
        *(x.data_ptr() for x in arrays[6:]),
        constant,
        coef.data_ptr(),
        torch.get_num_threads(),
    )
    _check_solved(singular, blocks)
    return coef


def rational_sums(
    u: Tensor,
    s: Tensor,
    g: Tensor,
    r0: Tensor,
    outside: bool,
    poles: Tensor,
    residues: Tensor,
    constant: float,
    base: Tensor,
    trained: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the op of the same name."""
    blocks, m, r = u.shape
    arrays = [_dense(x) for x in (u, s, g, r0, poles, residues, base, trained, c)]
    missed = missed_by(u, g, r0, outside) if m > 1 else (s.new_empty(0),) * 2
    reached, sqnorm, form = s.new_empty(blocks, m), s.new_empty(blocks), s.new_empty(blocks)
    singular = _cpu.rational_sums(
        arrays[0].data_ptr(),
        *(blocks, m, r),
        *(x.data_ptr() for x in arrays[1:4]),
        outside,
        *(x.data_ptr() for x in missed),
        len(poles),
        *(x.data_ptr() for x in arrays[4:6]),
        constant,
        *(x.data_ptr() for x in arrays[6:]),
        len(c),
        *(x.data_ptr() for x in (reached, sqnorm, form)),
        torch.get_num_threads(),
    )
    _check_solved(singular, blocks)
    return reached, sqnorm, form


def refuse_converged_removal(u: Tensor, s: Tensor, g: Tensor, rest: Tensor, null: Tensor, *_) -> str | None:
    return _refuse(u, s, g, rest, null)


def refuse_rational_removal(u, s, g, rest, null, r0, poles, residues, constant) -> str | None:
    wrong = [x.dtype for x in (poles, residues) if x.dtype != torch.complex128]
    if wrong:
        return f"poles and residues are {wrong[0]}; it takes torch.complex128"
    return _refuse(u, s, g, rest, null, r0)


def refuse_rational_sums(u, s, g, r0, outside, poles, residues, constant, base, trained, c) -> str | None:
    if u.dtype != torch.float64:
        return f"u is {u.dtype}; it takes torch.float64"
    if _cpu.instruction_set() == "baseline":
        return "vectors of two numbers, with which matrix products are faster"
    return refuse_rational_removal(u, s, g, r0, base, c, poles, residues, constant)


def _refuse(u: Tensor, *others: Tensor) -> str | None:
    if u.dtype not in (torch.float32, torch.float64):
        return f"u is {u.dtype}; it takes torch.float32 or torch.float64"
    wrong = [x.dtype for x in others if x.dtype != torch.float64]
    if wrong:
        return f"an argument is {wrong[0]}; it takes torch.float64 for all but u"
    if u.shape[1] > _cpu.MOST_ROWS:
        return f"blocks of {u.shape[1]} rows; it takes at most {_cpu.MOST_ROWS}, where LAPACK is faster"
    return None


def _dense(x: Tensor) -> Tensor:
    return x.detach().resolve_conj().resolve_neg().contiguous()


def _block(u: Tensor) -> tuple:
    blocks, m, r = u.shape
    return u.data_ptr(), u.dtype == torch.float32, blocks, m, r


def _result(rows: int, columns: int) -> Tensor:
    """Memory [rows, columns] for a result; that of an earlier one where it is large."""
    if rows * columns < _LARGE:
        return torch.empty(rows, columns, dtype=torch.float64)
    return torch.from_numpy(_cpu.result(rows, columns))


def _check_solved(singular: int, blocks: int) -> None:
    if singular:
        raise torch.linalg.LinAlgError(f"{singular} of {blocks} removed blocks lead to a singular system")
