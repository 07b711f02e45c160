"""CUDA kernels of block leave-one-out (csrc/cuda/removal.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _nvrtc
from .._nvrtc import dense

_THREADS = 128
_MOST_ROWS = 32
_SHARED = 48 * 1024


def converged_removal(
    u: Tensor, s: Tensor, g: Tensor, rest: Tensor, null: Tensor, shift: float
) -> tuple[Tensor, Tensor]:
    """See the op of the same name."""
    blocks, m, r = u.shape
    v, coef = s.new_empty(blocks, m), s.new_empty(blocks, r)
    if blocks:
        u, g, rest, null = (dense(x) for x in (u, g, rest, null))
        weight, singular = 1 / (s + shift), torch.zeros(1, dtype=torch.int32, device=s.device)
        size = 8 * (_features(m) + m * m + m + _room())
        args = (u, m, r, weight, g, rest, null, 1 / shift, v, coef, singular)
        _nvrtc.launch("removal.cu", f"converged_removal_{_type(u)}", (blocks,), _THREADS, size, u, *args)
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
    blocks, m, r = u.shape
    coef = s.new_empty(blocks, r)
    if blocks:
        u, g, rest, null, r0, residues = (dense(x) for x in (u, g, rest, null, r0, residues))
        table = torch.view_as_real(1 / (s - poles[:, None])).movedim(2, 1).contiguous()  # [q, 2, r]
        singular = torch.zeros(1, dtype=torch.int32, device=s.device)
        each = 8 * (2 * _features(m) + 2 * m * m + 2 * m)  # bytes of shared memory a pole takes
        group = max(1, min(len(poles), (_SHARED - 8 * _room()) // max(each, 1)))
        args = (u, m, r, g, rest, null, r0, len(poles), table, dense(-1 / poles), residues)
        _nvrtc.launch(
            "removal.cu",
            f"rational_removal_{_type(u)}",
            (blocks,),
            _THREADS,
            each * group + 8 * _room(),
            u,
            *args,
            float(constant),
            coef,
            singular,
            group,
        )
        _check_solved(singular, blocks)
    return coef


def refuse_converged_removal(u: Tensor, s: Tensor, g: Tensor, rest: Tensor, null: Tensor, shift: float) -> str | None:
    return _refuse(u)


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
    if u.shape[1] == 1:
        return "blocks of one row; products of all rows with the poles' table at once are faster"
    return _refuse(u)


def _refuse(u: Tensor) -> str | None:
    if u.shape[1] > _MOST_ROWS:
        return f"blocks of {u.shape[1]} rows; it takes at most {_MOST_ROWS}, whose systems fit shared memory"
    return None


def _features(m: int) -> int:
    return m * (m + 3) // 2


def _room() -> int:
    """Doubles of the sums across a block of threads: two halves of 16 for every warp."""
    return 2 * 16 * (_THREADS // 32)


def _type(u: Tensor) -> str:
    return "float32" if u.dtype == torch.float32 else "float64"


def _check_solved(singular: Tensor, blocks: int) -> None:
    count = int(singular)
    if count:
        raise torch.linalg.LinAlgError(f"{count} systems of {blocks} removed blocks are singular")
