"""C++ kernel of quadratic forms (csrc/cpu/triangular.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu


def triangular_sqnorm(c: Tensor, x: Tensor) -> Tensor:
    """See the op of the same name."""
    c, x = (held.detach().contiguous() for held in (c, x))
    out = x.new_empty(len(x))
    _cpu.triangular_sqnorm(
        c.data_ptr(), *c.shape, x.data_ptr(), len(x), out.data_ptr(), torch.get_num_threads()
    )  # fmt: skip
    return out


def product_sqnorm(a: Tensor, m: Tensor, base: Tensor) -> Tensor:
    """See the op of the same name."""
    a, m, base = (x if x.stride(-1) == 1 else x.contiguous() for x in (a.detach(), m.detach(), base.detach()))
    out = a.new_empty(a.shape[:2])
    (a_step, *a_row), (m_step, *m_row) = a.stride()[:2], m.stride()[:2]
    _cpu.product_sqnorm(
        (a.data_ptr(), a.shape[1], *a_row), a_step, (m.data_ptr(), m.shape[1], *m_row), m_step,
        (base.data_ptr(), len(base), base.stride(0)), m.shape[2], len(a), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def refuse_triangular_sqnorm(*_) -> str | None:
    return _refuse()


def refuse_product_sqnorm(*_) -> str | None:
    return _refuse()


def _refuse() -> str | None:
    if _cpu.instruction_set() == "baseline":
        return "vectors of two numbers, with which the matrix product is faster"
    return None
